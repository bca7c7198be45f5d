# `nix run ./kernels#build-and-copy` builds every variant of the kernel into kernels/build: see CONTRIBUTING.md.
{
  description = "tiedmoe-kernels: Mixture-of-Experts kernels that know layers are tied";

  inputs.kernel-builder.url = "github:huggingface/kernels";

  outputs =
    { self, kernel-builder, ... }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
