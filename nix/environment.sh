# Make tunesmith's Python environment, once, and print the shell lines that enter it.
#
#   TUNESMITH_SOURCE     folder with pyproject.toml and nix/requirements.txt
#   TUNESMITH_PYTHON     the interpreter
#   TUNESMITH_LIBRARIES  folders with libgcc_s.so.1, libstdc++.so.6 and libz.so.1, joined by colons
#   TUNESMITH_DRIVER     the folder with libcuda.so.1, where it is not in a usual place (optional)
#
# A new source, interpreter or library makes a new environment beside the old ones, under ~/.cache/tunesmith/nix.
# shellcheck shell=bash
set -euo pipefail
umask 077
IFS=: read -ra libraries <<<"$TUNESMITH_LIBRARIES"
base=${XDG_CACHE_HOME:-$HOME/.cache}/tunesmith/nix
key=$(printf '%s\n' "$TUNESMITH_SOURCE" "$TUNESMITH_PYTHON" "$TUNESMITH_LIBRARIES" | sha256sum)
venv=$base/${key:0:16}

refuse() { # what, fix
  printf 'error: %s\n  fix:   %s\n' "$1" "$2" >&2
  exit 1
}

first_of() { # file folder... -> its path in the first folder that has it
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

# Wheels expect three libraries of the system, which are not where a Python from nixpkgs looks. Loaded by path when
# Python starts, they serve every wheel by name; in LD_LIBRARY_PATH they would also reach programs of the host.
write_preload() {
  local name path
  printf 'import ctypes; list(map(ctypes.CDLL, ('
  for name in libgcc_s.so.1 libstdc++.so.6 libz.so.1; do
    path=$(first_of "$name" "${libraries[@]}") || refuse "no $name in $TUNESMITH_LIBRARIES" "nix flake check"
    printf '"%s", ' "$path"
  done
  printf ')))\n'
}

# Triton's ptxas names a loader of the system that NixOS lacks: the loader of this Python starts it.
write_assemblers() { # site-packages
  local loader program
  loader=$("$venv/bin/python" -c 'import re; print(re.search(r"\S*/ld-linux\S*", open("/proc/self/maps").read())[0])')
  mkdir -p "$venv/libexec"
  for program in "$1"/triton/backends/nvidia/bin/ptxas*; do
    [ -f "$program" ] || continue
    # `exec`, so that ptxas has the process that Triton waits for; the loader needs the file readable, no more.
    printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "$loader" "$program" >"$venv/libexec/${program##*/}"
    chmod +x "$venv/libexec/${program##*/}"
  done
}

make_environment() {
  local site
  printf 'installing into %s (once; several GB)\n' "$venv" >&2
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

# The GPU driver belongs to the host. NixOS has it in one folder; elsewhere it lies among the host's own libraries, of which
# a Python from nixpkgs must see no other: links to the driver's files alone, in a folder of this host.
driver_folder() { # -> a folder, or nothing where there is no driver
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
flock 9 # two shells that start at once make one environment
if [ ! -e "$venv/complete" ]; then
  trap 'refuse "the environment was not made; the lines above say why" \
    "mend that (network, room in $base), then start the same command again"' EXIT
  make_environment
  trap - EXIT
fi
driver=$(driver_folder)
[ -n "$driver" ] || echo "no NVIDIA driver found: this machine trains on its CPU" >&2

export_line() { printf 'export %s=%q\n' "$1" "$2"; }
export_line VIRTUAL_ENV "$venv"
printf 'export PATH=%q:"%s"\n' "$venv/bin" "\$PATH"
echo 'unset PYTHONPATH PYTHONHOME' # of another Python
echo 'unset LD_LIBRARY_PATH' # whose libraries would come before those of the wheels
if [ -n "$driver" ]; then
  export_line LD_LIBRARY_PATH "$driver"
  export_line TRITON_LIBCUDA_PATH "$driver"
fi
[ ! -e "$venv/libexec/ptxas" ] || export_line TRITON_PTXAS_PATH "$venv/libexec/ptxas"
[ ! -e "$venv/libexec/ptxas-blackwell" ] || export_line TRITON_PTXAS_BLACKWELL_PATH "$venv/libexec/ptxas-blackwell"
