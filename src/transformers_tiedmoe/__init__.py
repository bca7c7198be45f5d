"""Expert tying for Mixture-of-Experts language models in Hugging Face transformers."""
