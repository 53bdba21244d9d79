"""What a model is on a disk: safetensors, GGUF, tokenizers.

weights.py         safetensors -> tensors, each checked and each taken once
gguf_file.py       a GGUF file, mapped: its metadata and where its tensors are
gguf.py            what its metadata say: config.json, Hugging Face's names
gguf_weights.py    its tensors, dequantised as they are taken
gguf_tokenizer.py  its vocabulary as tokenizer.json; pre_tokenizers.py: how it splits texts
tokenizer.py       any tokenizer transformers can read -> tokenizer.json
"""
