{
  genAttrs = names: make: builtins.listToAttrs (map (name: { inherit name; value = make name; }) names);
  hasPrefix = prefix: text: builtins.substring 0 (builtins.stringLength prefix) text == prefix;
  makeLibraryPath = packages: builtins.concatStringsSep ":" (map (package: "${package.lib or package}/lib") packages);
}
