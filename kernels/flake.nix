# `kernel-builder build-and-copy kernels` builds a variant per backend into kernels/build, with nix.
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
