{ system }:
let
  build =
    name: variables: script:
    derivation (
      variables
      // {
        inherit name system;
        builder = "/bin/sh";
        args = [ "-euc" "PATH=/usr/bin:/bin\n${script}" ];
      }
    );
  # A program of this machine under the name that nixpkgs gives it.
  program = name: host: build name { } "mkdir -p $out/bin; ln -s ${host} $out/bin/";
  # A library of this machine: where its loader finds it.
  library =
    name: files:
    build name { } ''
      mkdir -p $out/lib
      for file in ${builtins.concatStringsSep " " files}; do
        path=$(/sbin/ldconfig -p | sed -n "s|^\s*$file .* => ||p" | head -1)
        ln -s "$path" $out/lib/
      done'';
  stdenv.cc = program "gcc-wrapper" "/usr/bin/cc" // {
    cc = program "gcc" "/usr/bin/cc" // {
      lib = library "gcc-lib" [ "libgcc_s.so.1" "libstdc++.so.6" ];
    };
  };
in
{
  inherit stdenv;
  bashInteractive = program "bash-interactive" "/bin/bash";
  python313 = program "python3" "/usr/bin/python3";
  util-linux = program "util-linux" "/usr/bin/flock";
  uv = build "uv" { } "mkdir -p $out/bin; cp ${./uv.py} $out/bin/uv; chmod +x $out/bin/uv";
  zlib = library "zlib" [ "libz.so.1" ];

  runCommand = build;
  writeShellApplication =
    {
      name,
      runtimeInputs,
      text,
    }:
    let
      path = builtins.concatStringsSep ":" (map (package: "${package}/bin") runtimeInputs);
    in
    build name { inherit text; } ''
      mkdir -p $out/bin
      printf '#!/bin/bash\nset -euo pipefail\nexport PATH="%s:$PATH"\n%s' '${path}' "$text" > $out/bin/${name}
      chmod +x $out/bin/${name}'';
  mkShell =
    { packages, ... }@variables:
    derivation (
      removeAttrs variables [ "packages" ]
      // {
        inherit system;
        builder = "/bin/bash"; # `nix develop` asks it for the variables of the shell
        args = [ ];
        outputs = [ "out" ];
        stdenv = ./stdenv;
        nativeBuildInputs = packages;
      }
    );
}
