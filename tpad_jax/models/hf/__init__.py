"""Vision-language models of Hugging Face: families, checkpoints and adapters."""
