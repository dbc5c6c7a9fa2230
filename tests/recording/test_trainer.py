"""transformers' Trainer records its run: language models, classifiers, LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import dropinf
from dropinf.interop.transformers import RecordCallback

SAMPLES, LENGTH = 12, 9


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=16, **sizes, **still))


def data(of_classes: bool) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(SAMPLES):
        ids = torch.randint(0, 40, (LENGTH,), generator=generator)
        labels = torch.randint(0, 3, (), generator=generator) if of_classes else ids
        found.append({"input_ids": ids, "labels": labels, "sample": torch.tensor(100 + i)})
    return found


def trained(model, tmp_path, *, recorded: bool = True, **options):
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        learning_rate=1e-2,
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    of_classes = isinstance(model, BertForSequenceClassification)
    data_ = data(of_classes)
    callback = RecordCallback(dropinf.Dropout(5), tmp_path / "run")
    if not recorded:
        data_ = [{k: v for k, v in row.items() if k != "sample"} for row in data_]
    Trainer(model, arguments, train_dataset=data_, callbacks=[callback] if recorded else []).train()
    return callback.run if recorded else None


def losses(model, batch):
    out = model(input_ids=batch["input_ids"]).logits
    if out.ndim == 2:
        return F.cross_entropy(out, batch["labels"], reduction="none")
    return F.cross_entropy(out[:, :-1].mT, batch["labels"][:, 1:], reduction="none").mean(1)


def lora() -> torch.nn.Module:
    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0))


@pytest.mark.parametrize("make", [llama, bert, lora], ids=["causal", "classes", "lora"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_trainer_records_its_run(make, accumulated: int, tmp_path) -> None:
    model = make()
    start = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    run = trained(model, tmp_path, gradient_accumulation_steps=accumulated)
    trained(plain, tmp_path, recorded=False, gradient_accumulation_steps=accumulated)
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    steps = 2 * -(-3 // accumulated)
    assert len(run) == steps
    assert sorted(x for i in range(steps) for x in run.ids(i)) == sorted(2 * [str(100 + i) for i in range(SAMPLES)])
    first = {int(x) - 100: row for x, row in zip(run.ids(0), run.rows(0), strict=True)}
    compressor = dropinf.Compressor.from_masks(run.masks, start, losses)
    rows = compressor.compress(
        [{k: torch.stack([data(make is bert)[i][k] for i in first]) for k in ("input_ids", "labels")}]
    )
    each = 4 if make is bert else len(first)  # a Trainer does not divide a classifier's loss by what it accumulates
    torch.testing.assert_close(torch.stack([*first.values()]), rows.flat / each, rtol=1e-3, atol=1e-6)
    query = dropinf.Compressor.from_masks(run.masks, model, losses)
    batch = {k: torch.stack([row[k] for row in data(make is bert)]) for k in ("input_ids", "labels")}
    scores, ids = dropinf.score(query.compress([batch]), run, kind="adamw").by_id()
    assert scores.isfinite().all()
    assert len(ids) == SAMPLES


def test_data_without_ids(tmp_path) -> None:
    callback = RecordCallback(dropinf.Dropout(5), tmp_path / "run", ids="other")
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False
    )
    rows = [{k: v for k, v in row.items() if k != "sample"} for row in data(False)]
    with pytest.raises(ValueError, match="without a column 'other'"):
        Trainer(llama(), arguments, train_dataset=rows, callbacks=[callback]).train()


@pytest.mark.filterwarnings("ignore:model. ")
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_models_with_tables_of_positions(kind: str, tmp_path) -> None:
    """Positions that all samples share are left out; what else there is, is right, and training as it was."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        model, more = GPT2LMHeadModel(config), {"output_hidden_states": True}
    else:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
        model, more = T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes)), {}
    finals = []
    for recorded in (False, True):
        one = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-2)
        recording = dropinf.record(one, dropinf.Dropout(4), optimizer, out=tmp_path) if recorded else None
        with recording or torch.enable_grad():
            for step in range(6):
                ids = torch.randint(0, 40, (5, (9, 7)[step % 2]), generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                torch.manual_seed(step)
                if recording is not None:
                    recording.samples(range(5))
                one(input_ids=ids, labels=ids, **more).loss.backward()
                optimizer.step()
        finals.append(list(one.parameters()))
    assert all(map(torch.equal, *finals))
    assert len(recording) == 6
    assert len(recording.shapes) > 8


def test_a_training_that_an_error_ended_is_begun_again(tmp_path) -> None:
    callback = RecordCallback(dropinf.Dropout(5), tmp_path / "run")
    model, failing = llama(), [True]

    def collate(rows):
        if failing and rows[0]["sample"] >= 0:
            failing.pop()
            raise KeyError("a broken sample")
        return default_data_collator(rows)

    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False, save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=data(False), callbacks=[callback], data_collator=collate)
    with pytest.raises(KeyError, match="a broken sample"):
        trainer.train()
    trainer.train()
    assert len(callback.run) == 6
