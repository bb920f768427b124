"""Stream many requests at once from a running server (`expertwire serve`).

python examples/grpc_client.py [HOST:PORT]
"""

import sys
from concurrent.futures import ThreadPoolExecutor

from expertwire.deploy.grpc.client import Client, ServerError


def main(address: str) -> None:
    with Client(address) as client:
        print(client.model_info()["architecture"])

        def ask(numbers: str) -> str:
            stream = client.generate(f"SUM {numbers} ?", temperature=0, max_tokens=64)
            return "".join(chunk.text for chunk in stream)

        with ThreadPoolExecutor(8) as pool:
            for text in pool.map(ask, (f"{n} {n + 1} {n + 2}" for n in range(16))):
                print(text)

        try:
            list(client.generate("SUM 1 2 ?", temperature=-1))
        except ServerError as error:
            print(error)  # names the field and the allowed values


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051")
