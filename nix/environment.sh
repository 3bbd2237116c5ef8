# Create tunesmith's Python environment if it does not exist, and print the shell commands that activate it.
#
#   TUNESMITH_SOURCE     folder with pyproject.toml and nix/requirements.txt
#   TUNESMITH_PYTHON     the Python interpreter
#   TUNESMITH_LIBRARIES  folders with libgcc_s.so.1, libstdc++.so.6 and libz.so.1, separated by colons
#   TUNESMITH_DRIVER     the folder with libcuda.so.1, if it is not in a usual folder (optional)
#
# Environments are in ~/.cache/tunesmith/nix. If the source, the interpreter or a library changes, a new environment is
# created, and the old ones are kept.
# shellcheck shell=bash
set -euo pipefail
umask 077
IFS=: read -ra libraries <<<"$TUNESMITH_LIBRARIES"
base=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/nix
key=$(printf '%s\n' "$TUNESMITH_SOURCE" "$TUNESMITH_PYTHON" "$TUNESMITH_LIBRARIES" | sha256sum)
venv=$base/${key:0:16}

refuse() { # arguments: what, fix
  printf 'error: %s\n  fix:   %s\n' "$1" "$2" >&2
  exit 1
}

# Print the path of a file in the first folder that contains it. Fail if no folder does.
first_of() { # arguments: file, folders
  local file=$1 folder
  shift
  for folder in "$@"; do
    if [ -e "$folder/$file" ]; then
      printf '%s\n' "$folder/$file"
      return
    fi
  done
  return 1
}

# Print a .pth line that loads three system libraries by path when Python starts. Wheels need them, and a Python from
# nixpkgs does not find them. LD_LIBRARY_PATH is not used for this, because programs of the host would load them too.
write_preload() {
  local name path
  printf 'import ctypes; list(map(ctypes.CDLL, ('
  for name in libgcc_s.so.1 libstdc++.so.6 libz.so.1; do
    path=$(first_of "$name" "${libraries[@]}") || refuse "$name is not in $TUNESMITH_LIBRARIES" "run: nix flake check"
    printf '"%s", ' "$path"
  done
  printf ')))\n'
}

# Write scripts that start Triton's ptxas with the dynamic loader of this Python. The loader that ptxas requests does not
# exist on NixOS.
write_assemblers() { # argument: site-packages
  local loader program
  loader=$("$venv/bin/python" -c 'import re; print(re.search(r"\S*/ld-linux\S*", open("/proc/self/maps").read())[0])')
  mkdir -p "$venv/libexec"
  for program in "$1"/triton/backends/nvidia/bin/ptxas*; do
    [ -f "$program" ] || continue
    # `exec` replaces the shell, so that Triton waits for ptxas. The wheel's file need not be executable, because the
    # loader only reads it.
    printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "$loader" "$program" >"$venv/libexec/${program##*/}"
    chmod +x "$venv/libexec/${program##*/}"
  done
}

make_environment() {
  local site
  printf 'installing packages into %s (only at the first start; several GB)\n' "$venv" >&2
  rm -rf "$venv"
  export UV_PYTHON_DOWNLOADS=never UV_NO_CONFIG=1
  uv venv --quiet --python "$TUNESMITH_PYTHON" "$venv" >&2
  uv pip sync --python "$venv/bin/python" --require-hashes "$TUNESMITH_SOURCE/nix/requirements.txt" >&2
  uv pip install --quiet --python "$venv/bin/python" --no-deps --no-build-isolation "$TUNESMITH_SOURCE" >&2
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  write_preload >"$site/_tunesmith_libraries.pth"
  write_assemblers "$site"
  touch "$venv/complete"
}

# Print a folder with the GPU driver of the host, or nothing if there is no driver. On NixOS the driver is in its own
# folder. On other systems it is next to libraries that a Python from nixpkgs must not load. There, create a folder
# with links to the driver's files only.
driver_folder() {
  local folders folder file links nixos=/run/opengl-driver/lib multiarch
  multiarch=/usr/lib/$(uname -m)-linux-gnu
  folders=("$nixos" "$multiarch" "$multiarch/nvidia/current" /usr/lib64 /usr/lib64/nvidia /usr/lib /usr/lib/wsl/lib)
  [ -z "${TUNESMITH_DRIVER-}" ] || folders=("$TUNESMITH_DRIVER")
  file=$(first_of libcuda.so.1 "${folders[@]}") || return 0
  folder=${file%/*} links=$base/driver-$(uname -n)
  if [ "$folder" = "$nixos" ]; then
    printf '%s\n' "$nixos"
    return
  fi
  mkdir -p "$links"
  for file in "$folder"/libcuda.so* "$folder"/libcudadebugger.so* "$folder"/libnvidia-*.so*; do
    [ -e "$file" ] || continue
    [ "$(readlink "$links/${file##*/}")" = "$file" ] || ln -sfn "$file" "$links/${file##*/}"
  done
  [ -e "$links/libcuda.so" ] || ln -sfn "$folder/libcuda.so.1" "$links/libcuda.so" # Triton links with -lcuda
  printf '%s\n' "$links"
}

mkdir -p "$base"
exec 9>"$venv.lock"
flock 9 # if two shells start concurrently, only one creates the environment
if [ ! -e "$venv/complete" ]; then
  trap 'refuse "the environment could not be created; the lines above show the reason" \
    "check the network and the free space in $base, then run the same command again"' EXIT
  make_environment
  trap - EXIT
fi
driver=$(driver_folder)
[ -n "$driver" ] || echo "no NVIDIA driver found: training runs on the CPU" >&2

export_line() { printf 'export %s=%q\n' "$1" "$2"; }
export_line VIRTUAL_ENV "$venv"
printf 'export PATH=%q:"%s"\n' "$venv/bin" "\$PATH"
echo 'unset PYTHONPATH PYTHONHOME' # they belong to another Python
echo 'unset LD_LIBRARY_PATH' # its libraries would be loaded instead of those of the wheels
if [ -n "$driver" ]; then
  export_line LD_LIBRARY_PATH "$driver"
  export_line TRITON_LIBCUDA_PATH "$driver"
fi
[ ! -e "$venv/libexec/ptxas" ] || export_line TRITON_PTXAS_PATH "$venv/libexec/ptxas"
[ ! -e "$venv/libexec/ptxas-blackwell" ] || export_line TRITON_PTXAS_BLACKWELL_PATH "$venv/libexec/ptxas-blackwell"
