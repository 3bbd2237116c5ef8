#!/usr/bin/env bash
# Fixes what `tunesmith doctor` found on this machine, in order. Read it first; it asks before it restarts Docker.
set -euo pipefail
[ "$(id -u)" != 0 ] || sudo() { "$@"; }
# VALUES
#@ keys
echo "== ssh: a key of yours that $PEER takes"
[ -e ~/.ssh/id_ed25519 ] || ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_ed25519
ssh-copy-id "$PEER"
#@ cable
echo "== the cable: addresses and MTU 9000 that last over a reboot"
sudo mkdir -p /etc/netplan
printf '%s\n' "$NETPLAN" | sudo tee /etc/netplan/60-tunesmith-cable.yaml
sudo chmod 600 /etc/netplan/60-tunesmith-cable.yaml
for name in $FUNCTIONS; do sudo ip link set dev "$name" up; done
sudo netplan apply
#@ toolkit
echo "== the NVIDIA container toolkit: 1.19 or later knows Swarm's resources again"
sudo apt-get update
sudo apt-get install -y nvidia-container-toolkit
#@ daemon
echo "== /etc/docker/daemon.json: merged, checked, with a backup"
merged=$(mktemp)
sudo cat /etc/docker/daemon.json 2>/dev/null | python3 -c '
import json, sys
text = sys.stdin.read().strip()
try:
    config = json.loads(text) if text else {}
except ValueError as error:
    sys.exit(f"/etc/docker/daemon.json is not JSON ({error}): correct it by hand, then start again")
config.setdefault("runtimes", {})["nvidia"] = {"path": "nvidia-container-runtime", "runtimeArgs": []}
config["default-runtime"] = "nvidia"
others = [e for e in config.get("node-generic-resources", []) if not e.startswith("NVIDIA_GPU=")]
config["node-generic-resources"] = others + [f"NVIDIA_GPU={uuid}" for uuid in sys.argv[1:]]
print(json.dumps(config, indent=4))
' $UUIDS >"$merged"
if dockerd --help 2>/dev/null | grep -q -- --validate; then sudo dockerd --validate --config-file "$merged"; fi
[ ! -e /etc/docker/daemon.json ] || sudo cp -p /etc/docker/daemon.json "/etc/docker/daemon.json.$(date +%Y%m%d-%H%M%S)"
sudo mkdir -p /etc/docker
sudo install -m 644 "$merged" /etc/docker/daemon.json
rm "$merged"
#@ swarm-resource
echo "== the toolkit takes the GPU that Swarm gives to a task"
sudo sed -i -e '1i swarm-resource = "DOCKER_RESOURCE_NVIDIA_GPU"' -e '/^#* *swarm-resource/d' /etc/nvidia-container-runtime/config.toml
#@ group
echo "== docker without sudo, from the next login on"
sudo usermod -aG docker "${SUDO_USER:-$(id -un)}"
#@ restart
echo "== Docker restarts; these containers stop:"
sudo docker ps --format '{{.Names}}  {{.Image}}  {{.Status}}'
if [ -n "$(sudo docker ps -q)" ]; then read -r -p "restart Docker now? [y/N] " yes && [ "$yes" = y ]; fi
sudo systemctl restart docker
#@ init
echo "== a swarm, with this one address"
sudo docker swarm init --advertise-addr "$ADDRESS" --listen-addr "$ADDRESS:2377" >/dev/null  # it would show the token
#@ join
echo "== into the swarm of $MANAGER, which is asked for its token now; the token is in no file and no command line"
token=$(ssh "$MANAGER" docker swarm join-token -q worker)
printf '{"ListenAddr": "%s:2377", "AdvertiseAddr": "%s", "RemoteAddrs": ["%s:2377"], "JoinToken": "%s"}' \
  "$ADDRESS" "$ADDRESS" "$MANAGER" "$token" |
  sudo curl -fsS --unix-socket /var/run/docker.sock -H 'Content-Type: application/json' --data @- http://docker/swarm/join
#@ end
echo "== done: tunesmith doctor looks again"
