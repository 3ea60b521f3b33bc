"""What the tests of serving share: an oracle with all keys and written-out masks, tiny models, padded prompts."""

import torch

from tests.support.models import attentions, with_masks
from tests.support.oracle import attended
from tmx_compile import TriangleMixConfig

CONFIG = TriangleMixConfig(
    triangle_layer_indices=[1, 2], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=32
)
SETTINGS = dict(do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0, eos_token_id=None)


def prompt(batch=1, n=100):
    return torch.randint(1, 128, (batch, n))


def left_padded(starts, n=100):
    mask = torch.ones(len(starts), n, dtype=torch.long)
    for row, start in enumerate(starts):
        mask[row, :start] = 0
    return mask


def row_masks(config, n, attention_mask=None, *, prompt=None, triangle=None, streaming=None):
    """(B, n, n) bool of a dense and of a triangle layer.

    ``triangle``: (begin, end) ranges of rows that are one prompt each, the rows up to ``end`` under the triangle mask
    of ``end`` keys. Rows from ``prompt`` on, and the range ``streaming``, see sinks and window. All others are dense.
    """
    key_mask = None if attention_mask is None else attention_mask[:, :n].bool()
    dense = attended(n, n, key_mask, 0, 0, n)
    layer = dense.clone()
    for begin, end in triangle or ():
        part = None if key_mask is None else key_mask[:, :end]
        layer[:, begin:end, :end] = attended(end, end, part, *config.geometry.counts)[:, begin:end]
    ranges = (streaming, None if prompt is None else (prompt, n))
    for begin, end in filter(None, ranges):
        sink, window, _ = config.geometry.counts
        layer[:, begin:end] = attended(n, n, key_mask, sink, window, 0)[:, begin:end]
    return dense, layer


def oracle_logits(model, config, ids, attention_mask=None, **rows):
    """Logits in float64 of the whole sequence in one pass with all keys; see :func:`row_masks`."""
    dense, triangle = row_masks(config, ids.shape[1], attention_mask, **rows)
    layers = set(config.layers())
    masks = {index: triangle if index in layers else dense for index in range(len(attentions(model)))}
    return with_masks(model, ids, masks, attention_mask)


def check_generated(model, config, ids, mask, out, atol=2e-5, **rows):
    """Every generated token's logits against the oracle run over what was generated."""
    n, steps = ids.shape[1], len(out.logits)
    whole = None
    if mask is not None:
        whole = torch.cat([mask, mask.new_ones(mask.shape[0], out.sequences.shape[1] - n)], 1)
    rows.setdefault("prompt", n)
    want = oracle_logits(model, config, out.sequences, whole, **rows)[:, n - 1 : n - 1 + steps]
    got = torch.stack(out.logits, 1).double()
    torch.testing.assert_close(got, want, atol=atol, rtol=0)
    return got
