#!/usr/bin/env bash
# A Ray cluster for `expertwire serve --launcher ray`: one head, any number of workers, one shared token.
set -euo pipefail

usage() {
    cat <<'END'
usage:
  ray_cluster.sh head --token-file FILE [--port PORT] [--node-ip IP] [--num-cpus N] [--num-gpus N]
  ray_cluster.sh join HOST:PORT --token-file FILE [--node-ip IP] [--num-cpus N] [--num-gpus N]
  ray_cluster.sh stop

head   starts the first node of a cluster on this machine and prints how to join it and how to serve on it.
       A FILE that does not exist is made, with a random token that only its owner can read.
join   adds this machine to the cluster of the head at HOST:PORT. FILE must hold the head's token: copy it here first.
stop   ends every Ray process of this user on this machine.

--port       of the head (6379)
--node-ip    address under which the other machines reach this one (found by itself where there is one route)
--num-cpus, --num-gpus   what Ray may hand out here (all there are); a rank takes one GPU, or one CPU

A machine whose GPUs are in an NVLink fabric with those of others gets the label ray.io/gpu-domain=CLUSTER.CLIQUE, by which the
ranks of an engine are kept together.

Run it in the Python environment that expertwire is installed in, the same version on every machine. The machines must reach
each other on all ports: Ray, the ranks' collectives and the controller pick theirs freely. The token keeps strangers out of
Ray; it is no encryption, so use a private network.
END
}

fail() {
    echo "ray_cluster.sh: $1" >&2
    exit "${2:-1}"
}

# The address of this machine on the way to host $1.
address_towards() {
    python -c '
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((sys.argv[1], 9))
    print(probe.getsockname()[0])' "$1"
}

need_ray() {
    command -v ray >/dev/null || fail "no 'ray' on the PATH: activate the Python environment that expertwire is installed in"
}

make_token() {
    (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$1")
    echo "a new token is in $1"
}

parse_options() {
    token_file="" port=6379 node_ip="" resources=()
    while (($#)); do
        (($# >= 2)) || fail "$1 needs a value (see --help)" 2
        case "$1" in
            --token-file) token_file=$2 ;;
            --port) port=$2 ;;
            --node-ip) node_ip=$2 ;;
            --num-cpus | --num-gpus) resources+=("$1" "$2") ;;
            *) fail "unknown option $1 (see --help)" 2 ;;
        esac
        shift 2
    done
    [[ $port =~ ^[0-9]+$ ]] || fail "--port: '$port' is not a number" 2
    [[ -n $token_file ]] || fail "--token-file is missing (see --help)" 2
    token_file=$(realpath --canonicalize-missing "$token_file")
}

# The NVLink fabric that all GPUs of this machine have joined, as nvidia-smi tells it; nothing if there is none.
nvlink_domain() {
    command -v nvidia-smi >/dev/null || return 0
    nvidia-smi -q 2>/dev/null | awk -F ' *: *' '
        { gsub(/^ +| +$/, "", $1); gsub(/ +$/, "", $2) }
        NF == 1 { in_fabric = ($1 == "Fabric") }
        in_fabric && $1 == "State" { gpus++; completed += ($2 == "Completed") }
        in_fabric && $1 == "CliqueId" { clique = $2 }
        in_fabric && $1 == "ClusterUUID" && $2 ~ /[1-9a-f]/ { domains[$2 "." clique] }
        END { for (domain in domains) { count++; found = domain }; if (count == 1 && completed == gpus) print found }'
}

start() {
    local domain
    domain=$(nvlink_domain) || domain=""
    [[ -z $domain ]] || resources+=(--labels "ray.io/gpu-domain=$domain")
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token_file
    ray start --disable-usage-stats --node-ip-address "$node_ip" "${resources[@]}" "$@" >"$log" 2>&1 || {
        ! grep -q InvalidAuthToken "$log" || fail "--token-file: the token in $token_file is not the head's"
        cat "$log" >&2
        fail "Ray did not start"
    }
}

head() {
    parse_options "$@"
    need_ray
    [[ -n $node_ip ]] || node_ip=$(address_towards 8.8.8.8) || fail "no route to other machines; name this one's address with --node-ip"
    [[ -e $token_file ]] || make_token "$token_file"
    start --head --port "$port" --include-dashboard=false
    cat <<END
the head runs at $node_ip:$port
on other machines, with the same token file:
  ray_cluster.sh join $node_ip:$port --token-file $token_file
here, once they have joined:
  RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token_file expertwire serve --launcher ray --ray-address $node_ip:$port
END
}

join() {
    local address=${1:-}
    [[ $address =~ ^[^:]+:[0-9]+$ ]] || fail "join needs the head's HOST:PORT, got '$address' (see --help)" 2
    parse_options "${@:2}"
    need_ray
    [[ -s $token_file ]] || fail "--token-file: $token_file does not exist or is empty; copy it from the head"
    [[ -n $node_ip ]] || node_ip=$(address_towards "${address%:*}") || fail "no route to ${address%:*}"
    timeout 5 bash -c "exec 3<>/dev/tcp/${address%:*}/${address##*:}" 2>/dev/null || fail "nothing answers at $address"
    start --address "$address"
    echo "$node_ip has joined $address"
}

stop() {
    need_ray
    ray stop >"$log" 2>&1 || {
        cat "$log" >&2
        fail "Ray did not stop"
    }
    echo "Ray has ended on this machine"
}

case "${1:-}" in
    -h | --help) usage; exit 0 ;;
    head | join | stop) ;;
    "") usage >&2; exit 2 ;;
    *) fail "unknown command $1 (see --help)" 2 ;;
esac
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$@"
