#!/bin/sh
# Start a command as any user. `exec` replaces this shell by the command, so that the command receives the signal of
# `docker stop`. A run then saves and exits with code 75.
set -eu

# A user id that is not in /etc/passwd has no home folder and no name, but libraries need both.
if [ "${HOME:-/}" = / ] || [ ! -w "$HOME" ]; then
    HOME=$(mktemp -d) && export HOME
fi
: "${USER:=user$(id -u)}" && export USER
: "${LOGNAME:=$USER}" && export LOGNAME

# The keys of trackers are in files, because `docker inspect` shows environment variables.
for key in WANDB_API_KEY COMET_API_KEY SWANLAB_API_KEY MLFLOW_TRACKING_TOKEN; do
    if [ -r "/run/secrets/$key" ]; then
        export "$key=$(cat "/run/secrets/$key")"
    fi
done

# NVIDIA's entry point finds the libraries of the driver. It then replaces itself by the command.
if [ -x /opt/nvidia/nvidia_entrypoint.sh ]; then
    exec /opt/nvidia/nvidia_entrypoint.sh "$@"
fi
exec "$@"
