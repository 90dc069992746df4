"""A base whose steps take milliseconds."""

from pathlib import Path


def write_small_base(folder, *, layers=2, **shape):
    """A Llama with the built-in tokenizer; sizes that NF4 takes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import ftray

    tokenizer = AutoTokenizer.from_pretrained(Path(ftray.__file__).parent / "models" / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
