"""Vision-language models of Hugging Face, unchanged, behind the face of ``MultimodalLM``."""
