"""Expert kernels that know layers are tied; today the plain torch reference they will be tested against."""

__version__ = "0.1.0"
