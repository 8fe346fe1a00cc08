"""Hugging Face formats: backbones read from safetensors, adapters written for `peft`, texts tokenised by `tokenizers`."""
