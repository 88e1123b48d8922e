"""Models: the embedded demo model, downloads, and everything that loads weights.

Its files:

    loading.py             the only mlx_lm.load
    info.py                facts from the files
    weights.py             bytes of weights, on disk and in memory
    device.py              the memory of MLX's device
    vocabulary.py          all of a model that needs no MLX
    grammar_compiler.py    constraints -> what follows an answer token by token
    grammar_problem.py     why one does not compile, and where
    demo.py                the embedded default: fetched once, converted
    gguf_demo.py           its file, as a folder that mlx-lm loads
    hub.py                 downloads from the Hugging Face Hub
    hub_child.py           the program that does them
    child.py               another program, which can be ended
    file_limit.py          importing mlx_lm without losing open files
    detokenizer.py         tokens -> text as the tokenizer decodes it, tried at load
    token_text.py          single tokens -> text
    fast_decoder.py        the decoder of a fast tokenizer, step by step
    window_detokenizer.py  text from tokens with nothing known but ``decode``
    split.py               a model as trunk and head
    mtp_heads.py           the model's own MTP head
    mtp_families.py        what it is called
    mtp_weights.py         its tensors
    mtp_extract.py         out of an original checkpoint
    whole_file.py          all or nothing on disk
    die_with_parent.py     and which ends with this process
"""

from mlx_engine.models.file_limit import file_limit_kept

with file_limit_kept():
    import mlx_lm  # noqa: F401 - the first import in this package; the others find it done
