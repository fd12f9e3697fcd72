"""The small multimodal language model that is committed with the package."""
