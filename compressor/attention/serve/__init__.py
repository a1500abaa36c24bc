"""Runs a checkpoint that carries an attention policy in transformers, with a cache as small as the
policy allows. Only transformers' own extension points are used: a registered attention function, a
`Cache`, and pre-hooks of the attention modules. One call sets a loaded model up:

    model = AutoModelForCausalLM.from_pretrained(folder)
    runtime = attach(model, folder)
    model.generate(**inputs, **runtime.options())
"""

from compressor.attention.serve.attach import Runtime, attach
from compressor.attention.serve.cache import PolicyCache

__all__ = ["PolicyCache", "Runtime", "attach"]
