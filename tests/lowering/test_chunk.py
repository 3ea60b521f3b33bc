"""A prompt in chunks is the prompt in one pass: the same mask for every row, from what is said about its end."""

import threading

import pytest
import torch

from tests.support.chunks import CASES, SIZES, check_operator, feed, fixed, growing
from tests.support.models import tiny_qwen3
from tests.support.oracle import tolerance
from tests.support.serving import CONFIG, SETTINGS, left_padded, oracle_logits, prompt
from tmx_compile import LoweringError, TriangleMixConfig, prefill, tmx_backend
from tmx_compile.integrations.transformers import StreamingCache
from tmx_compile.lowering.chunk import CHUNK, OWN_END
from tmx_compile.operator.prefill import current_chunk

# The configuration names layers 1 and 2; where no cache is made for it, a model of two layers is quicker to trace.
N = 100


def check(got, model, ids, mask=None, *, config=CONFIG, triangle=None, begin=0, **rows):
    want = oracle_logits(model, config, ids, mask, triangle=triangle, **rows)[:, begin:]
    seen = torch.ones_like(ids[:, begin:]).bool() if mask is None else mask[:, begin:].bool()
    torch.testing.assert_close(got[seen].double(), want[seen], atol=2e-5, rtol=0)
    assert torch.isfinite(got).all()


def chunked(model, config=CONFIG, **kwargs):
    backend = tmx_backend(config, chunked_prefill=True, strict=True, **kwargs)
    return torch.compile(model, backend=backend, dynamic=True), backend


@pytest.mark.parametrize("make", [growing, fixed])
@pytest.mark.parametrize("starts", [None, (0, 40)])
def test_chunks_equal_one_pass(make, starts, eager):
    """Chunk sizes of every kind: one token, a boundary inside the last rows, at it, and one chunk; one compiled set."""
    model, ids = tiny_qwen3(2), prompt(2)
    mask = None if starts is None else left_padded(starts)
    step, backend = chunked(model)
    for sizes in SIZES:
        with prefill(total_tokens=N):
            got = feed(step, make(model), ids, sizes, mask)
        check(got, model, ids, mask, triangle=[(0, N)])
    assert {site.lowering for site in backend.report.triangle()} == {"chunked"}
    # Other totals, other sizes: once every length is dynamic, nothing is compiled again.
    counts = []
    for n, several in ((130, ((130,), (41,), (3, 80))), (117, ((117,), (29,), (5, 90)))):
        longer = prompt(2, n)
        mask = None if starts is None else left_padded(starts, n)
        for sizes in several:
            with prefill(total_tokens=n):
                got = feed(step, make(model), longer, sizes, mask)
            check(got, model, longer, mask, triangle=[(0, n)])
        counts.append(backend.report.graphs)
    assert counts[0] == counts[1] <= 8


def test_the_total_decides_between_dense_and_triangle(eager):
    """A chunk of at most min_seq_len rows of a long prompt is sparse; a short prompt stays dense."""
    model = tiny_qwen3(2)
    step, _ = chunked(model)
    for n in (32, 33, 20, 64):
        ids = prompt(1, n)
        for sizes in ((n,), (7,)):
            with prefill(total_tokens=n):
                got = feed(step, growing(model), ids, sizes)
            check(got, model, ids, triangle=[(0, n)] if n > 32 else None)


def test_without_a_total_the_caller_declares_the_final_chunk(eager):
    model, ids = tiny_qwen3(2), prompt(2)
    step, _ = chunked(model)
    cache = growing(model)
    with prefill(final=False):
        got = [feed(step, cache, ids[:, :60], (25,))]
    with prefill(final=True):
        got.append(feed(step, cache, ids, (40,), begin=60))
    check(torch.cat(got, 1), model, ids, triangle=[(0, N)])
    # Last rows that were fed before the final chunk are not last rows: that cannot be taken back.
    cache = growing(model)
    with prefill(final=False):
        got = [feed(step, cache, ids[:, :97], (25,))]
    with prefill(final=True):
        got.append(feed(step, cache, ids, (3,), begin=97))
    check(torch.cat(got, 1), model, ids, triangle=[(97, N)], streaming=(0, 97))
    # A final chunk that is the whole of a short prompt stays dense.
    short = prompt(1, 30)
    with prefill(final=True):
        check(feed(step, growing(model), short, (30,)), model, short)


def test_without_a_word_each_call_is_a_prompt_of_its_own(eager):
    """As without chunked_prefill: the rows of a long call are sparse, with last rows at its end; decoding is dense."""
    model, ids = tiny_qwen3(2), prompt(2)
    mask = torch.ones_like(ids)
    mask[1, 80:] = 0
    step, _ = chunked(model)
    check(feed(step, growing(model), ids, (N,), mask), model, ids, mask, triangle=[(0, N)])
    check(feed(step, growing(model), ids, (50, 10, 40)), model, ids, triangle=[(0, 50), (60, N)])
    check(feed(step, growing(model), ids, (90, 1)), model, ids, triangle=[(0, 90)])


def test_right_padding_with_a_total_for_each_sequence(eager):
    model, ids = tiny_qwen3(2), prompt(3)
    mask = torch.ones_like(ids)
    mask[1, 70:], mask[2, 35:] = 0, 0
    step, _ = chunked(model)
    for sizes in ((N,), (30,), (64, 9)):
        with prefill(total_tokens=[100, 70, 35]):
            got = feed(step, growing(model), ids, sizes, mask)
        check(got, model, ids, mask, triangle=[(0, N)])


@pytest.mark.parametrize("make", [growing, fixed])
def test_a_continued_conversation(make, eager):
    """The second turn's rows stand at their absolute positions, and its last rows count from its own end."""
    model, ids = tiny_qwen3(2), prompt(2, 140)
    step, _ = chunked(model)
    for sizes in ((100, 40), (30, 70, 25, 15)):
        cache = make(model)
        with prefill(total_tokens=100):
            got = [feed(step, cache, ids[:, :100], sizes)]
        with prefill(total_tokens=140):
            got.append(feed(step, cache, ids, sizes[-1:], begin=100))
        check(torch.cat(got, 1), model, ids, triangle=[(0, 100), (100, 140)])


@pytest.mark.parametrize("decode", ["dense", "streaming", "cache"])
@pytest.mark.filterwarnings("ignore:streaming decode")
def test_generate_with_chunks(decode, eager):
    """``generate`` cuts the prompt itself; decode steps inside and outside of the block are decode steps."""
    model, ids, mask = tiny_qwen3(3), prompt(2, 101), left_padded((0, 40), 101)
    mode = "streaming" if decode == "streaming" else "dense"
    model.compile(backend=tmx_backend(CONFIG, chunked_prefill=True, decode=mode, strict=True))
    settings = SETTINGS | dict(attention_mask=mask, prefill_chunk_size=25, max_new_tokens=10)
    cache = StreamingCache(model, CONFIG, prompt_tokens=101) if decode == "cache" else growing(model)
    with prefill(total_tokens=101):
        out = model.generate(ids, past_key_values=cache, **settings)
    begin = None if decode == "dense" else 101
    whole = torch.cat([mask, mask.new_ones(2, 10)], 1)
    want = oracle_logits(model, CONFIG, out.sequences, whole, triangle=[(0, 101)], prompt=begin)
    got = torch.stack(out.logits, 1).double()
    torch.testing.assert_close(got, want[:, 100:-1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("lowering", ["operator"])
def test_named_lowerings(lowering, eager):
    model, ids, mask = tiny_qwen3(2), prompt(2), left_padded((0, 40))
    step, _ = chunked(model, lowering=lowering)
    with prefill(total_tokens=N):
        check(feed(step, growing(model), ids, (33,), mask), model, ids, mask, triangle=[(0, N)])


def test_through_inductor():
    """Later chunks, compiled; the first is as long as its rows see everything anyway."""
    model, ids, mask = tiny_qwen3(2), prompt(2), left_padded((0, 10))
    config = TriangleMixConfig(
        triangle_layer_indices=[1], num_sink_tokens=4, sliding_window_size=16, num_last_tokens=8, min_seq_len=32
    )
    step, backend = chunked(model, config)
    cache = growing(model)
    feed(model, cache, ids[:, :20], (20,), mask)
    with prefill(total_tokens=N):
        got = feed(step, cache, ids, (45, 35), mask, begin=20)
    check(got, model, ids, mask, config=config, triangle=[(0, N)], begin=20)
    assert {site.lowering for site in backend.report.triangle()} == {"chunked"}
    assert backend.report.graphs == 1


def test_threads_have_their_own_prompts(eager):
    """What one thread says about its prompt is not heard in another."""
    model = tiny_qwen3(2)
    step, _ = chunked(model)
    prompts = [prompt(1, n) for n in (60, 100, 130)]
    for n in (60, 100):  # compile first
        with prefill(total_tokens=n):
            feed(step, growing(model), prompt(1, n), (20,))
    results, barrier = {}, threading.Barrier(3)

    def work(ids):
        with prefill(total_tokens=ids.shape[1]):
            barrier.wait()
            results[ids.shape[1]] = feed(step, growing(model), ids, (20,))

    threads = [threading.Thread(target=work, args=(ids,)) for ids in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ids in prompts:
        check(results[ids.shape[1]], model, ids, triangle=[(0, ids.shape[1])])


@pytest.mark.parametrize("lowering", ["auto", "operator", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_the_operator_equals_the_oracle(name, lowering):
    """Every place of the first last row: before the chunk, at its rows, behind it; its own end; one per sequence."""
    case = CASES[name]
    if lowering == "triton" and case.dtype == torch.bfloat16 and not torch.cuda.is_available():
        lowering = "blocked"
    # Where there is a GPU, the kernels run nowhere else.
    device = "cuda" if lowering == "triton" and torch.cuda.is_available() else "cpu"
    check_operator(case, lowering, device, tolerance(case.dtype))


def test_the_operators_pass_opcheck():
    q, k, v, key_mask = CASES["padding"].tensors()
    for first in ([75, 75, 75], [60, 80, 90], [OWN_END] * 3):
        args = (q, k, v, key_mask, torch.tensor(first), 4, 8, 5, 0.25, None, "auto")
        torch.library.opcheck(CHUNK, args)
    with prefill(total_tokens=90):
        torch.library.opcheck(torch.ops.tmx.first_last_row.default, (q, None, 30, 90, 8, 32, False))
        torch.library.opcheck(torch.ops.tmx.first_last_row.default, (q, torch.tensor([[60]]), 30, 150, 8, 32, False))


def test_bad_arguments():
    for given in ((), (None,), (5, True)):
        with (
            pytest.raises(ValueError, match="give total_tokens or final"),
            prefill(*given[:1], final=(*given, None, None)[1]),
        ):
            pass
    with pytest.raises(ValueError, match="total_tokens must be a positive integer, got 0"), prefill(0):
        pass
    with pytest.raises(ValueError, match="final must be True or False, got 1"), prefill(final=1):
        pass
    with pytest.raises(ValueError, match="a number for each sequence"), prefill([]):
        pass
    with pytest.raises(ValueError, match="chunked_prefill must be True or False"):
        tmx_backend(CONFIG, chunked_prefill="yes")
    with pytest.raises(ValueError, match="takes a lowering of auto, triton, blocked, operator, got 'flex'"):
        tmx_backend(CONFIG, chunked_prefill=True, lowering="flex")
    assert "chunked_prefill=True" in repr(tmx_backend(CONFIG, chunked_prefill=True))


def test_refusals(eager):
    model, ids = tiny_qwen3(2), prompt(2)
    step, _ = chunked(model)
    with (
        prefill(total_tokens=[100, 90, 80]),
        pytest.raises(ValueError, match="has 3 numbers, and the batch 2 sequences"),
    ):
        feed(step, growing(model), ids, (50,))
    torch._dynamo.reset()
    step, _ = chunked(model)
    with pytest.raises(Exception, match="inference only") as error:
        step(ids, use_cache=False)
    assert isinstance(error.value.inner_exception, LoweringError)


def test_a_prompt_that_ends_leaves_nothing_behind():
    with prefill(5):
        with prefill(final=False):
            assert current_chunk().totals is None
        assert current_chunk().totals == (5,)
    assert current_chunk() is None
    block = prefill(5)
    block.__enter__()
    block.__exit__(None, None, None)
    assert current_chunk() is None
