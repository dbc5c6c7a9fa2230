"""Losses of causal language models and sequence classifiers, and that padding and packing change no gradient."""

from __future__ import annotations

import contextlib
import itertools
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import dropinf
from dropinf.text.passages import Passage
from dropinf.transformer import TextModel, Workload
from dropinf.workload import map_tensors
from tests.text.models import IDS, PASSAGES, SMALL, WORDS

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


@contextlib.contextmanager
def refused(*parts: str, error: type[Exception] = ValueError):
    """The error's message, of one line, has all parts."""
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def model_of(folder: str, **options) -> TextModel:
    return TextModel(folder, **{"dtype": torch.float64} | options)


@dataclass
class Found:
    losses: dict[str, torch.Tensor]
    gradients: dict[str, dict[str, torch.Tensor]]  # id -> layer -> gradient
    sizes: list[int]  # of the batches


def compressed(work: Workload, sketch=None) -> Found:
    """What a workload gives, by the samples' ids."""
    compressor = dropinf.Compressor(work.model, sketch or dropinf.Identity(), work.loss_fn, cu_seqlens=work.cu_seqlens)
    rows = compressor.compress(work.batches)
    ids = [list(work.ids(batch)) for batch in work.batches]
    with torch.no_grad():
        losses = torch.cat([work.loss_fn(work.model, batch) for batch in work.batches])
    flat = [i for batch in ids for i in batch]
    gradients = {i: {name: rows[name][n] for name in rows.layers} for n, i in enumerate(flat)}
    return Found(dict(zip(flat, losses, strict=True)), gradients, [len(batch) for batch in ids])


def assert_same(got: Found, want: Found, tolerance: float = 1e-9) -> None:
    assert set(got.losses) == set(want.losses) == set(IDS)
    for i in IDS:
        assert float((got.losses[i] - want.losses[i]).abs() / want.losses[i]) <= tolerance
        # Rounding noise of gradients that are zero by symmetry (the bias of attention keys) is measured by the others.
        largest = max(float(g.norm()) for g in want.gradients[i].values())
        assert largest > 0
        for name, g in want.gradients[i].items():
            error = float((got.gradients[i][name] - g).norm() / max(float(g.norm()), 1e-5 * largest))
            assert error <= tolerance, f"{i}, {name}: {error:.1e}"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loss_of_a_batch_is_each_documents_own(folders, name, reduction):
    model = model_of(folders(name))
    for packed in (False, True):
        work = model.workload(PASSAGES, tokens_per_batch=40, packed=packed, loss=reduction)
        found = {}
        for batch in work.batches:
            found |= dict(zip(work.ids(batch), work.loss_fn(work.model, batch), strict=True))
        assert set(found) == set(IDS)
        for passage in PASSAGES:
            ids = torch.tensor([model.tokenizer(passage.text)["input_ids"]])
            out = model.model(input_ids=ids, labels=ids)
            want = F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction=reduction)
            assert float((found[passage.id] - want).abs() / want) < 1e-12
            own = out.loss * (ids.shape[1] - 1 if reduction == "sum" else 1)  # in float32, whatever the model's dtype
            assert float((found[passage.id] - own).abs() / own) < 1e-5


@pytest.mark.parametrize("sketch", [dropinf.Identity(), dropinf.Dropout(8)], ids=["identity", "dropout"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_of_padded_packed_and_single_documents_agree(folders, name, sketch, attention):
    model = model_of(folders(name))
    assert model.model.config._attn_implementation == "sdpa"
    single = compressed(model.workload(PASSAGES, tokens_per_batch=1), sketch)
    assert single.sizes == [1] * len(PASSAGES)
    model.model.set_attn_implementation(attention)
    padded = compressed(model.workload(PASSAGES, tokens_per_batch=40), sketch)
    assert padded.sizes == [2, 4, 2]
    packed = compressed(model.workload(PASSAGES, tokens_per_batch=30, packed=True), sketch)
    assert packed.sizes == [3, 5]
    # Eager attention computes its softmax in float32.
    tolerance = 1e-9 if attention == "sdpa" else 1e-5
    assert_same(padded, single, tolerance)
    assert_same(packed, single, tolerance)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2 classifier"])
def test_gradients_of_padded_and_single_texts_agree(folders, name):
    model = model_of(folders(name, pad=True))
    assert model.task == "classifier"
    single = compressed(model.workload(PASSAGES, tokens_per_batch=1))
    padded = compressed(model.workload(PASSAGES, tokens_per_batch=40, loss="sum"))
    assert (single.sizes, padded.sizes) == ([1] * len(PASSAGES), [2, 4, 2])
    assert_same(padded, single)
    for passage in PASSAGES:
        ids = torch.tensor([model.tokenizer(passage.text)["input_ids"]])
        want = F.cross_entropy(model.model(input_ids=ids).logits, torch.tensor([passage.label]))
        assert float((padded.losses[passage.id] - want).abs()) < 1e-12


def test_padding_contributes_exactly_nothing(folders):
    """Whatever id is in the padding."""
    for name in ("llama", "bert"):
        work = model_of(folders(name)).workload(PASSAGES, tokens_per_batch=40)
        for batch in work.batches:
            other = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)
            assert torch.equal(work.loss_fn(work.model, batch), work.loss_fn(work.model, batch | {"input_ids": other}))


def test_batches(folders):
    model = model_of(folders("llama"))
    work = model.workload(PASSAGES, tokens_per_batch=40)
    assert len(work.batches) == 3
    assert [len(b["input_ids"]) for b in work.batches[1:]] == [4, 2]
    first = work.batches[0]
    assert first.keys() == {"ids", "input_ids", "attention_mask", "labels"}
    assert work.ids(first) == ["p3", "p6"]
    assert first["attention_mask"].sum(1).tolist() == [14, 11]
    assert torch.equal(first["labels"] == -100, first["attention_mask"] == 0)
    assert work.ids(map_tensors(lambda t: t + 0, first)) == ["p3", "p6"]
    again = model.workload(PASSAGES, tokens_per_batch=40)
    for batch, other in zip(work.batches, again.batches, strict=True):
        assert work.ids(batch) == again.ids(other)
        assert all(torch.equal(batch[k], other[k]) for k in ("input_ids", "labels"))
    packed = model.workload(PASSAGES, tokens_per_batch=30, packed=True)
    batch = packed.batches[0]
    assert packed.ids(batch) == ["p3", "p6", "p4"]
    assert packed.cu_seqlens(batch).tolist() == [0, 14, 25, 30]
    assert batch["position_ids"][0, 12:17].tolist() == [12, 13, 0, 1, 2]
    assert batch["labels"][0, [0, 14, 25]].tolist() == [-100] * 3
    with pytest.raises(IndexError):
        work.batches[3]


def test_model_is_frozen_and_cut_to_its_context(folders):
    model = TextModel(folders("gpt2"))
    assert not model.model.training
    assert not any(p.requires_grad for p in model.model.parameters())
    assert model.model.dtype == torch.float32
    assert model.max_tokens == 32
    assert TextModel(folders("roberta", pad=True)).max_tokens == 30  # its first two positions are for padding
    long = [Passage("long", " ".join(WORDS * 3)), Passage("short", "the cat")]
    with pytest.warns(UserWarning, match="1 of 2 passages are longer than 32 tokens and were cut"):
        work = model.workload(long)
    assert work.batches[0]["attention_mask"].sum(1).tolist() == [32, 2]
    with pytest.warns(UserWarning, match="1 of 2 passages are longer than 4 tokens"):
        work = TextModel(folders("gpt2"), max_tokens=4).workload(long)
    assert work.batches[0]["attention_mask"].sum(1).tolist() == [4, 2]


def test_half_precision_losses_are_wide(folders):
    model = TextModel(folders("llama"), dtype=torch.bfloat16)
    wide = TextModel(folders("llama")).workload(PASSAGES)
    for packed in (False, True):
        work = model.workload(PASSAGES, packed=packed)
        losses = dict(zip(work.ids(work.batches[0]), work.loss_fn(work.model, work.batches[0]), strict=True))
        want = dict(zip(wide.ids(wide.batches[0]), wide.loss_fn(wide.model, wide.batches[0]), strict=True))
        assert all(losses[i].dtype == torch.float32 for i in IDS)
        assert all(float((losses[i] - want[i]).abs() / want[i]) < 0.05 for i in IDS)


def test_classifier_without_a_padding_token(folders):
    """It reads the last token, whatever that is: here id 0, which fills batches up elsewhere."""
    model = model_of(folders("gpt2 classifier"))
    passages = [Passage("a", "the cat unknown", 0), Passage("b", "two dogs ran", 1), Passage("c", "unknown", 2)]
    work = model.workload(passages)
    assert [work.ids(b) for b in work.batches] == [["a"], ["b"], ["c"]]
    for passage, batch in zip(passages, work.batches, strict=True):
        ids = torch.tensor([model.tokenizer(passage.text)["input_ids"]])
        hidden = model.model.transformer(input_ids=ids).last_hidden_state[:, -1]
        want = F.cross_entropy(model.model.score(hidden), torch.tensor([passage.label]))
        assert float((work.loss_fn(work.model, batch)[0] - want).abs()) < 1e-12


def test_what_is_wrong_with_passages(folders):
    causal, classifier = model_of(folders("llama")), model_of(folders("bert", pad=True))
    for model in (causal, classifier):
        with refused("passages is empty"):
            model.workload([])
    with refused("passage one: its number of tokens is 1, so there is no next token to predict; leave it out"):
        causal.workload([*PASSAGES, Passage("one", "cat")])
    with refused("passage none: its number of tokens is 0, so there is nothing to read"):
        classifier.workload([Passage("none", " ", 0)])
    for label in (None, 3, -1):
        with refused(f"passage x: label is {label}; ", "needs one from 0 to 2"):
            classifier.workload([*PASSAGES, Passage("x", "the cat", label)])
    with refused("loss is 'max'; it must be 'mean' or 'sum'"):
        causal.workload(PASSAGES, loss="max")
    with refused("tokens_per_batch is 0; it must be at least 1"):
        causal.workload(PASSAGES, tokens_per_batch=0)


def test_what_cannot_be_packed(folders):
    with refused("packed is True for a classifier; only a causal-lm can be packed"):
        model_of(folders("bert", pad=True)).workload(PASSAGES, packed=True)
    with refused("does not keep packed documents apart (", "pass packed=False"):
        model_of(folders("bloom")).workload(PASSAGES, packed=True)
    with refused("a document has 14 tokens, but", "windows of 8", "pass packed=False or max_tokens=8"):
        model_of(folders("mistral")).workload(PASSAGES, packed=True)
    model = model_of(folders("gpt2"))  # Llama's positions are relative
    forward = model.model.forward
    model.model.forward = lambda **inputs: forward(**inputs | {"position_ids": None})
    with refused("does not keep packed documents apart (its logits change by"):
        model.workload(PASSAGES, packed=True)


def test_documents_of_a_packed_row_are_masked_from_each_other(folders):
    """By the mask too, as not every release of transformers sees it from the positions."""
    model = model_of(folders("gpt2"))
    forward, seen = model.model.forward, []

    def record(**inputs):
        seen.append(inputs.get("attention_mask"))
        return forward(**inputs)

    model.model.forward = record
    work = model.workload(PASSAGES, tokens_per_batch=30, packed=True)
    batch = work.batches[0]
    work.loss_fn(work.model, batch)
    mask, cu = seen[-1], work.cu_seqlens(batch).tolist()
    assert mask.shape == (1, 1, 30, 30)
    visible = torch.zeros(30, 30, dtype=torch.bool)
    for start, end in itertools.pairwise(cu):
        for position in range(start, end):
            visible[position, start : position + 1] = True
    assert torch.equal(mask[0, 0] == 0, visible)
    assert bool((mask[0, 0][~visible] == torch.finfo(torch.float64).min).all())


def test_rounding_to_float32_is_no_leak(folders):
    """Gemma 2 computes its softmax in float32, whatever its dtype."""
    assert len(model_of(folders("gemma2")).workload(PASSAGES, packed=True).batches) == 1


def test_windows_are_kept_without_packing_or_behind_them(folders):
    model = model_of(folders("mistral"))
    assert_same(
        compressed(model.workload(PASSAGES, tokens_per_batch=40)),
        compressed(model.workload(PASSAGES, tokens_per_batch=1)),
    )
    model = model_of(folders("mistral"), max_tokens=8)
    with pytest.warns(UserWarning, match="3 of 8 passages"):
        packed, single = (compressed(model.workload(PASSAGES, tokens_per_batch=n, packed=n > 1)) for n in (20, 1))
    assert_same(packed, single)


def test_what_is_wrong_with_a_model(folders, tmp_path, monkeypatch):
    with refused(f"model {tmp_path}: transformers cannot load it ("):
        TextModel(tmp_path)
    with refused(
        "its files have no score.weight, so these would be random; pass a model that was trained as a classifier"
    ):
        TextModel(folders("gpt2"), task="classifier")
    with refused("task is 'lm'; it must be 'auto', 'causal-lm' or 'classifier'"):
        TextModel(folders("gpt2"), task="lm")
    for tokens in (1, 33):
        with refused(f"max_tokens is {tokens}; it must be at least 2 and at most 32, the context of "):
            TextModel(folders("gpt2"), max_tokens=tokens)
    with refused("num_labels is 1, a regression; a classifier has at least 2"):
        TextModel(folders("bert", pad=True, num_labels=1)).workload(PASSAGES)
    with refused("its tokenizer gave token", "and it has 5 embeddings"):
        TextModel(folders("gpt2", vocab_size=5)).workload(PASSAGES)
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folders("gpt2")).save_pretrained(tmp_path)
    with refused("its architecture is BertModel, neither ...ForCausalLM nor ...ForSequenceClassification"):
        TextModel(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with refused("a GGUF file needs gguf; install it with: pip install gguf", error=ModuleNotFoundError):
        TextModel(f"{tmp_path}/model.gguf")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused(
        "a model of text needs transformers; install it with: pip install transformers", error=ModuleNotFoundError
    ):
        TextModel(tmp_path)
