{
  description = "What flake.nix takes from nixpkgs, made of this machine's own programs; an unknown name is an error";

  outputs =
    { self }:
    {
      lib = import ./lib.nix;
      legacyPackages = {
        x86_64-linux = import ./packages.nix { system = "x86_64-linux"; };
        aarch64-linux = import ./packages.nix { system = "aarch64-linux"; };
      };
    };
}
