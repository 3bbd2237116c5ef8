#!/bin/sh
# Start a command as any user, and become it: `docker stop` reaches the run itself, which saves and exits with 75.
set -eu

# A user id without a line in /etc/passwd has no home and no name; libraries ask for both.
if [ "${HOME:-/}" = / ] || [ ! -w "$HOME" ]; then
    HOME=$(mktemp -d) && export HOME
fi
: "${USER:=user$(id -u)}" && export USER
: "${LOGNAME:=$USER}" && export LOGNAME

# Keys of trackers come as files: `docker inspect` would show variables.
for key in WANDB_API_KEY COMET_API_KEY SWANLAB_API_KEY MLFLOW_TRACKING_TOKEN; do
    if [ -r "/run/secrets/$key" ]; then
        export "$key=$(cat "/run/secrets/$key")"
    fi
done

# NVIDIA's own entry point finds the driver's libraries, and becomes what it is given.
if [ -x /opt/nvidia/nvidia_entrypoint.sh ]; then
    exec /opt/nvidia/nvidia_entrypoint.sh "$@"
fi
exec "$@"
