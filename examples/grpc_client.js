// Stream a request from a running server (`expertwire serve`) in JavaScript, with a stub made from the proto file.
//
//   npm install @grpc/grpc-js @grpc/proto-loader
//   node examples/grpc_client.js [HOST:PORT]

const path = require("node:path");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const proto = path.join(__dirname, "..", "deploy", "proto", "expertwire_v1.proto");
const { Inference } = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true, defaults: true })).expertwire.v1;
const client = new Inference(process.argv[2] ?? "127.0.0.1:50051", grpc.credentials.createInsecure());

const stream = client.Generate({ text: "SUM 40 70 15 ?", sampling_params: { temperature: 0, max_tokens: 64 } });
stream.on("data", (message) => {
  for (const chunk of message.chunks) process.stdout.write(chunk.text);
  if (message.usage) console.log(`\n${message.usage.completion_tokens} tokens`);
});
stream.on("error", (error) => {
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
