"""The fast path's kernels against the code that they stand for: autograd through transformers' own."""
import copy

import pytest
import torch

import kernels


def llama(**more):
    from transformers import LlamaConfig, LlamaModel
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(hidden_size=32, intermediate_size=192, num_hidden_layers=2,
                                  num_attention_heads=4, vocab_size=50, **more))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_is_transformers_own_bit_for_bit(dtype):
    """Values and gradients; install() puts it where transformers looks it up."""
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb as own
    kernels.install(llama())
    assert modeling_llama.apply_rotary_pos_emb is kernels.rotary
    draw = torch.Generator().manual_seed(0)
    cos, sin = (torch.randn(1, 5, 8, generator=draw).to(dtype) for _ in range(2))
    tensors = [torch.randn(1, 5, heads, 8, generator=draw).to(dtype).transpose(1, 2) for heads in (3, 1)]
    up, found = [torch.randn(x.shape, generator=draw).to(dtype) for x in tensors], []
    for function in (own, kernels.rotary):
        leaves = [x.clone().requires_grad_() for x in tensors]
        turned = function(*leaves, cos, sin)
        torch.autograd.backward(turned, up)
        found.append([*turned, *(x.grad for x in leaves)])
    assert same(*found)
    assert all(x.is_contiguous() for x in turned)


def layers(kind="llama", dtype=torch.float32, frozen=True):
    """A model of transformers' with norms of any size, and the same with the kernels."""
    from transformers import AutoConfig, AutoModel
    torch.manual_seed(0)
    more = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 50}
    stock = AutoModel.from_config(AutoConfig.for_model(kind, **more)).to(dtype).requires_grad_(not frozen)
    for name, p in stock.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    ours = copy.deepcopy(stock)
    kernels.install(ours)
    return stock, ours


@pytest.mark.parametrize("kind", kernels.LIKE_LLAMA)
@pytest.mark.parametrize("length", [3, 1500])
@pytest.mark.parametrize("dtype, frozen", [(torch.float32, True), (torch.float32, False),
                                           (torch.bfloat16, True), (torch.float64, True)])
@pytest.mark.parametrize("large", [0, kernels.LARGE])
def test_a_decoder_layer_is_transformers_own_bit_for_bit(kind, length, dtype, frozen, large, monkeypatch):
    """Values and gradients (whole: the weights' too), over one block of rows and over several."""
    monkeypatch.setattr(kernels, "LARGE", large)
    draw, found = torch.Generator().manual_seed(1), []
    x, up = (torch.randn(1, length, 96, generator=draw).to(dtype) for _ in range(2))
    for model in layers(kind, dtype, frozen):
        leaf, y = x.clone().requires_grad_(), None
        places = model.rotary_emb(x, torch.arange(length)[None])
        for layer in model.layers:
            y = layer(leaf if y is None else y, attention_mask=None, position_embeddings=places)
        y.backward(up)
        found.append([y, leaf.grad, *(p.grad for p in model.layers.parameters() if not frozen)])
    assert len(found[0]) > 2 * (not frozen) and same(*found)


def test_tensors_may_lie_as_they_like():
    """What is written row by row must arrive, also where x's rows are no rows in memory."""
    x, weight = torch.randn(2, 64, 40).transpose(1, 2), torch.rand(64)
    dense = x.contiguous()
    for kernel in (lambda x: kernels.SwiGLU.apply(x, x),
                   lambda x: sum(kernels.RMSNorm.apply(x, weight, 1e-6))):
        found = []
        for tensor in (dense, x):
            leaf = tensor.detach().requires_grad_()
            out = kernel(leaf)
            out.backward(torch.ones_like(out))
            found.append([out, leaf.grad])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_the_kernels_are_what_runs(monkeypatch):
    model, ran = llama(), []
    kernels.install(model)
    monkeypatch.setattr(kernels, "LARGE", 0)
    model.requires_grad_(False)
    for name in ("RMSNorm", "SwiGLU", "Rotary"):
        kernel = getattr(kernels, name)
        apply = lambda *args, name=name, kernel=kernel: ran.append(name) or kernel.apply(*args)  # noqa: E731
        monkeypatch.setattr(kernels, name, type(name, (), {"apply": staticmethod(apply)}))
    model(inputs_embeds=torch.randn(1, 5, 32))
    assert ran == ["RMSNorm", "Rotary", "Rotary", "RMSNorm", "SwiGLU"] * 2


def test_a_gated_mlp_keeps_its_gate_and_not_what_silu_makes_of_it():
    gate, up = (torch.randn(4, 8, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        kernels.SwiGLU.apply(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]


def test_what_is_not_known_is_left_alone():
    """Granite has a LLaMA's modules and scales its residuals; a GELU is no SiLU."""
    _, installed = layers("granite")
    assert not any("forward" in vars(module) for module in installed.modules())
    model = llama(hidden_act="gelu")
    kernels.install(model)
    assert "forward" in vars(model.layers[0]) and "forward" not in vars(model.layers[0].mlp)


def test_a_copy_of_a_model_runs_on_its_own_weights():
    """Without an adapter the frozen reference is a copy, made after install()."""
    model = llama()
    kernels.install(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].mlp.down_proj.weight.zero_()
    x = torch.ones(1, 2, 32)
    assert model.layers[0].mlp(x).any() and not other.layers[0].mlp(x).any()
    assert other.layers[0].mlp.forward.__self__ is other.layers[0].mlp


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("queries, keys", [(256, 256), (700, 700), (120, 756), (257, 513), (1, 300)])
def test_attention_is_torchs_to_rounding(queries, keys, dtype, close):
    """Values and gradients, of slices of a row."""
    draw, found = torch.Generator().manual_seed(0), []
    whole = [torch.randn(1, 2, n + 7, 128, generator=draw).to(dtype) for n in (queries, keys, keys)]
    up = torch.randn(1, 2, queries, 128, generator=draw).to(dtype)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    for side in ("torch", "ours"):
        leaves = [x[:, :, 3:-4].detach().requires_grad_() for x in whole]
        if side == "torch":
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, attn_mask=seen, scale=0.1)
        else:
            out = kernels.attend(*leaves, scale=0.1)
            assert type(out.grad_fn).__name__ == "AttentionBackward"
        out.backward(up)
        found.append([out, *(x.grad for x in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


def test_attention_is_torchs_own_where_nothing_is_gained():
    """Short or very long rows, narrow heads, a reference's, shared heads, half precision."""
    def name(length=300, heads=2, dtype=torch.float32, trains=True, width=128):
        q, k, v = (torch.randn(1, n, length, width, dtype=dtype, requires_grad=trains)
                   for n in (2, heads, heads))
        return type(kernels.attend(q, k, v, scale=1.0).grad_fn).__name__
    assert name() == "AttentionBackward"
    others = [name(255), name(1025), name(heads=1), name(dtype=torch.bfloat16), name(trains=False),
              name(width=96)]
    assert not any(x == "AttentionBackward" for x in others)


def test_contiguous_lays_out_the_gradient_too(monkeypatch):
    monkeypatch.setattr(kernels, "LARGE", 0)
    x = torch.randn(2, 3, 4, requires_grad=True)
    y = kernels.contiguous(x.transpose(0, 1))
    assert y.is_contiguous() and torch.equal(y, x.transpose(0, 1))
    seen = []
    z = x * 1
    z.register_hook(lambda grad: seen.append(grad.is_contiguous()))
    kernels.contiguous(z).backward(torch.randn(4, 3, 2).permute(2, 1, 0))
    assert seen == [True]


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_chunked_logps_equal_log_softmax(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, target = torch.randn(11, 5, dtype=torch.float64), torch.randint(11, (7,))
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(7), target]
    up = torch.randn(7, dtype=torch.float64)
    wanted, = torch.autograd.grad(expected, hidden, up)
    got = kernels.ChunkedLogps.apply(hidden, weight, target, chunk)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, hidden, up)[0], wanted)
