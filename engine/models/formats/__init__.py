"""What weights are computed in.

    choice.py      which format a machine gets, and why
    int8.py        int8 weights as they are stored and read
    quantize.py    made of float weights once, layer by layer
    float_pass.py  the calibrating text through the model meanwhile
    quality.py     what a format costs, in perplexity: paired, with an interval

float32, float16 and bfloat16 need no file: their weights are the checkpoint's, converted as they
are read (parameters.py).
"""
