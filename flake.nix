{
  description = "Fine-tune open-weight language models from one recipe file";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/efa487181cc01970ebb09ed193fa71dfe94784b1";

  outputs =
    { self, nixpkgs }:
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      each = make: nixpkgs.lib.genAttrs systems (system: make (outputs system));

      # Files that the environment depends on. Changes of other files do not create a new environment.
      parts = [
        "LICENSE"
        "README.md"
        "nix"
        "pyproject.toml"
        "recipes"
        "scripts"
        "src"
      ];
      source = builtins.path {
        name = "tunesmith-source";
        path = ./.;
        filter =
          path: type:
          baseNameOf path != "__pycache__"
          && builtins.any (
            part: path == toString ./. + "/${part}" || nixpkgs.lib.hasPrefix (toString ./. + "/${part}/") path
          ) parts;
      };
      scripts = {
        LLAMA3_3B_FULL_SCRIPT = "${source}/scripts/Llama3_3B_full_finetuning.py";
        LLAMA3_8B_LORA_SCRIPT = "${source}/scripts/Llama3_8B_LoRA_finetuning.py";
        LLAMA3_70B_LORA_SCRIPT = "${source}/scripts/Llama3_70B_LoRA_finetuning.py";
        LLAMA3_70B_QLORA_SCRIPT = "${source}/scripts/Llama3_70B_qLoRA_finetuning.py";
      };

      outputs =
        system:
        let
          pkgs = nixpkgs.legacyPackages.${system};
          python = "${pkgs.python313}/bin/python3";

          # The Python packages are installed from wheels, whose hashes are checked against nix/requirements.txt. Wheels
          # need no build and include CUDA 13 on both systems, and the transformers of this nixpkgs revision is too old.
          environment = pkgs.writeShellApplication {
            name = "tunesmith-environment";
            runtimeInputs = [
              pkgs.uv
              pkgs.util-linux
            ];
            text = ''
              export TUNESMITH_SOURCE=${source} TUNESMITH_PYTHON=${python}
              export TUNESMITH_LIBRARIES=${
                nixpkgs.lib.makeLibraryPath [
                  pkgs.stdenv.cc.cc
                  pkgs.zlib
                ]
              }
            ''
            + builtins.readFile ./nix/environment.sh;
          };
          enter = ''
            exports=$(${environment}/bin/tunesmith-environment) || exit 1
            eval "$exports"
          '';
          # torch.compile and Triton need a C compiler in addition to the Python packages.
          tunesmith = pkgs.writeShellApplication {
            name = "tunesmith";
            runtimeInputs = [ pkgs.stdenv.cc ];
            text = enter + ''
              exec "$VIRTUAL_ENV/bin/tunesmith" "$@"
            '';
          };
          check = name: command: pkgs.runCommand "tunesmith-${name}" { } "${command}\ntouch $out";
        in
        {
          packages = {
            inherit tunesmith;
            default = tunesmith;
          };

          apps = rec {
            tunesmith = {
              type = "app";
              program = "${self.packages.${system}.tunesmith}/bin/tunesmith";
            };
            default = tunesmith;
          };

          devShells = rec {
            pytorch-fine-tune = pkgs.mkShell (
              scripts
              // {
                name = "pytorch-fine-tune";
                packages = [ pkgs.uv ];
                shellHook = enter;
              }
            );
            default = pytorch-fine-tune;
          };

          checks = {
            inherit tunesmith;
            help = check "help" ''
              PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=${source}/src ${python} -c '
              import sys
              from tunesmith.cli.main import main
              sys.exit(main(sys.argv[1:]))' --help'';
            scripts = check "scripts" ''
              ${python} -c '
              import sys
              for name in sys.argv[1:]:
                  compile(open(name).read(), name, "exec")' ${toString (builtins.attrValues scripts)}'';
          };
        };
    in
    {
      packages = each (made: made.packages);
      apps = each (made: made.apps);
      devShells = each (made: made.devShells);
      checks = each (made: made.checks);
    };
}
