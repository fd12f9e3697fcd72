"""Vision-language models of the Hugging Face families, their checkpoints and their adapters."""
