"""Corrections beside a checkpoint: as PEFT reads them, as compress does, and what it says of damage."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_lm
from transformers import AutoModelForCausalLM

from compress.checkpoint.adapter import KEY, peft_config, remove_adapter, write_adapter
from compress.checkpoint.card import model_card
from compress.checkpoint.formats import find_format, open_weights
from compress.checkpoint.native import Contents, decode, encode
from compress.checkpoint.save import lacking
from compress.checkpoint.writer import remove_checkpoint
from compress.errors import RunError
from compress.kernels.correction import Correction
from compress.pipeline import compress
from compress.progress import Reporter, Stage
from compress.recipe import read_recipe

FORMATS = ("native", "compressed-tensors", "gptq")
KINDS = {"peft": {}, "single": {"single": 6}, "two bits": {"bits": 2}, "both": {"bits": 4, "single": 6}}


def random_correction(shape=(32, 64), rank=4, single=0, bits=16, seed=0, dtype=torch.float16):
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, shape[1], generator=random), torch.randn(shape[0], rank, generator=random) * 0.01
    index = torch.randperm(shape[0] * shape[1], generator=random)[:single].sort().values.int()
    alone = (index, torch.randn(single, generator=random)) if single else ()
    return Correction(a, b, *alone).rounded(dtype, bits)


@pytest.fixture
def make_corrected(tmp_path, make_layer, make_checkpoint):
    """A checkpoint of two corrected layers of unlike ranks and one without, and these layers."""

    def make(format_name="native", symmetric=True, **kind):
        names = [f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down")]
        layers = [make_layer(name, seed=i, symmetric=symmetric) for i, name in enumerate(names)]
        layers[0] = replace(layers[0], correction=random_correction(seed=1, **kind))
        layers[1] = replace(layers[1], correction=random_correction(seed=2, rank=3, **kind))
        form = find_format(format_name)
        plain = [replace(layer, correction=None) for layer in layers]
        tensors = {name: t for layer in plain for name, t in form.layer_tensors(layer, torch.float16).items()}
        said = write_adapter(tmp_path, [layer for layer in layers if layer.correction is not None])
        make_checkpoint(tmp_path, tensors, form.quantization_config(plain, []), **said)
        return tmp_path, layers

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format_name", FORMATS)
def test_the_dense_view_adds_them_in_float32_and_rounds_once(make_corrected, format_name, kind):
    folder, layers = make_corrected(format_name, **KINDS[kind])
    files = open_weights(folder)
    assert sorted(files.names()) == sorted(layer.param for layer in layers)
    for layer in layers:
        wanted = layer.packed.dequantize()
        if layer.correction is not None:
            wanted = wanted + layer.correction.delta()
        assert torch.equal(wanted, layer.dequantize())
        assert torch.equal(files.read(layer.param), wanted.half())
    inside = sorted(file.name for file in (folder / "adapter").iterdir())
    assert inside == (
        ["adapter_config.json", "adapter_model.safetensors"] if kind == "peft" else ["corrections.safetensors"]
    )
    added = next((folder / "adapter").glob("*.safetensors"))
    assert files.nbytes() <= added.stat().st_size + (folder / "model.safetensors").stat().st_size
    assert {entry.file for entry in files.entries.values()} == {added, folder / "model.safetensors"}


@pytest.mark.parametrize("kind", KINDS)
def test_experts_and_turned_layers_are_corrected_as_they_lie(tmp_path, make_layer, make_checkpoint, kind):
    turned = make_layer("h.0.c", shape=(48, 64), transposed=True)
    experts = [make_layer(f"h.0.e.{i}", param="h.0.e", index=i, seed=i) for i in range(3)]
    layers = [replace(turned, correction=random_correction((48, 64), **KINDS[kind])), *experts]
    layers[2] = replace(layers[2], correction=random_correction(**KINDS[kind]))
    form = find_format("native")
    plain = [replace(layer, correction=None) for layer in layers]
    tensors = {name: t for layer in plain for name, t in form.layer_tensors(layer).items()}
    said = write_adapter(tmp_path, [layer for layer in layers if layer.correction is not None])
    assert said == {KEY: "adapter/corrections.safetensors"}, "PEFT has no place for a slice"
    files = open_weights(make_checkpoint(tmp_path, tensors, form.quantization_config(plain), **said))
    assert torch.equal(files.read("h.0.c.weight"), layers[0].dequantize().half().T)
    assert torch.equal(files.read("h.0.e"), torch.stack([layer.dequantize().half() for layer in layers[1:]]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_keeps_them_with_their_layer(make_layer, kind):
    layers = [replace(make_layer("a"), correction=random_correction(**KINDS[kind])), make_layer("b")]
    tensors, manifest = encode(Contents(layers))
    back = decode(tensors, json.loads(json.dumps(manifest))).layers
    assert back[1].correction is None and type(back[0].correction) is type(layers[0].correction)
    for name, tensor in layers[0].correction.tensors().items():
        assert torch.equal(back[0].correction.tensors()[name], tensor)
    part = next(name for name in tensors if name.startswith("a.correction."))
    with pytest.raises(RunError, match=r"the correction of a is damaged \("):
        decode(tensors | {part: tensors[part][:1]}, manifest)
    del tensors[part]
    with pytest.raises(RunError, match=f"lacks the tensor {part}"):
        decode(tensors, manifest)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_puts_them_on_the_model(tmp_path, make_layer, architecture):
    peft = pytest.importorskip("peft")
    model, merged = tiny_lm(architecture), tiny_lm(architecture)
    corrected = []
    for i, (name, module) in enumerate(merged.named_modules()):
        if name.endswith(("q_proj", "down_proj", "c_attn", "mlp.c_proj")):
            turned = architecture == "gpt2"
            shape = tuple(module.weight.T.shape if turned else module.weight.shape)
            correction = random_correction(shape, rank=2 + i % 3, seed=i, dtype=torch.float32)
            corrected.append(replace(make_layer(name, transposed=turned), correction=correction))
            module.weight.data += correction.delta().T if turned else correction.delta()
    assert write_adapter(tmp_path, corrected) == {KEY: "adapter/adapter_model.safetensors"}
    tokens = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        wanted, dense = merged(tokens).logits, model(tokens).logits
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        torch.testing.assert_close(adapted(tokens).logits, wanted, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(adapted.merge_and_unload()(tokens).logits, wanted, atol=1e-5, rtol=1e-4)
    assert (wanted - dense).abs().max() > 1e-2


def test_layers_of_another_rank_are_named():
    config = peft_config({"a": 4, "b": 4, "c": 2})
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {"c": 2}


def _edit(name, **changes):
    def damage(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def _tensors(name, change):
    def damage(folder):
        file = folder / "adapter" / name
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return damage


def _cut(folder):
    file = next((folder / "adapter").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-7])


A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
PEFT, CONFIG = "adapter_model.safetensors", "adapter/adapter_config.json"


@pytest.mark.parametrize(
    ("kind", "damage", "complaint"),
    [
        ("peft", lambda folder: remove_adapter(folder), "lacks adapter/adapter_model.safetensors, which belongs"),
        ("two bits", lambda folder: remove_adapter(folder), "lacks adapter/corrections.safetensors"),
        ("peft", _cut, "not a whole safetensors file"),
        ("two bits", _cut, "not a whole safetensors file"),
        ("peft", lambda folder: (folder / CONFIG).unlink(), "cannot read .*adapter_config.json"),
        ("peft", lambda folder: (folder / CONFIG).write_text("[]"), "is no JSON object"),
        ("peft", _edit(CONFIG, lora_alpha=8), "says another lora_alpha"),
        ("peft", _edit(CONFIG, use_rslora=True), "says another use_rslora"),
        ("peft", _tensors(PEFT, lambda tensors: tensors.pop(A.replace("_A", "_B"))), "one tensor too many or too few"),
        (
            "peft",
            _tensors(PEFT, lambda t: t.update({A: t[A][:, :3].contiguous()})),
            "correction of .*up_proj is damaged",
        ),
        (
            "peft",
            _tensors(PEFT, lambda t: t.update({name.replace("up", "odd"): t.pop(name) for name in list(t)})),
            r"is for model.layers.0.mlp.odd_proj, which is not packed",
        ),
        ("single", _tensors("corrections.safetensors", lambda tensors: None), "metadata of .* is damaged"),
        ("peft", _edit("config.json", **{KEY: "../secret.safetensors"}), "which is not one of"),
    ],
)
def test_damage_is_one_line_that_names_it(make_corrected, kind, damage, complaint):
    folder, layers = make_corrected(**KINDS[kind])
    open_weights(folder)
    damage(folder)
    with pytest.raises(RunError, match=complaint) as raised:
        for layer in layers:
            open_weights(folder).read(layer.param)
    assert "\n" not in str(raised.value)


def test_an_adapter_that_config_json_does_not_name_is_not_ours(make_corrected):
    folder, layers = make_corrected()
    config = json.loads((folder / "config.json").read_text())
    del config[KEY]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(open_weights(folder).read(layers[0].param), layers[0].packed.dequantize().half())


def test_one_adapter_takes_the_place_of_another_and_goes_with_its_checkpoint(make_corrected):
    folder, layers = make_corrected()
    (folder / "run").mkdir()
    corrected = [replace(layer, correction=random_correction(bits=2)) for layer in layers]
    write_adapter(folder, corrected)
    assert [file.name for file in (folder / "adapter").iterdir()] == ["corrections.safetensors"]
    (folder / "adapter-for-dense").mkdir()
    (folder / "adapter-for-dense" / "adapter_model.safetensors").touch()
    remove_checkpoint(folder)
    assert [file.name for file in folder.iterdir()] == ["run"]
    assert write_adapter(folder, []) == {} and not (folder / "adapter").exists()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "notes.txt").write_text("mine")
    remove_adapter(folder)
    assert (folder / "adapter" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(("bits", "options"), [(16, {}), (2, {}), (16, {"residual": 0.01})])
def test_a_run_with_a_correction_goes_through_its_checkpoint(tmp_path, text_file, bits, options):
    folder, out = save_tiny(tmp_path / "dense", dtype=torch.bfloat16), tmp_path / "out"
    flags = {
        "model": str(folder),
        "calib": {"source": str(text_file), "nsamples": 4, "seqlen": 32},
        "target": {"wbits": 2, "group_size": 32},
        "quantizer": "rtn",
        "recover": ["low-rank"],
        "adapter_bits": bits,
        "options": {"low-rank": {"rank": 4, **options}},
    }
    result = compress(read_recipe(None, flags), folder, out, Reporter(quiet=True))
    plain = bits == 16 and not options
    config = json.loads((out / "config.json").read_text())
    assert config[KEY] == f"adapter/{'adapter_model' if plain else 'corrections'}.safetensors"
    entries = open_weights(out).entries.values()
    assert result["compressed_bytes"] == sum(file.stat().st_size for file in {entry.file for entry in entries})
    assert lacking(out, folder, result) is None
    lines = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]
    before, after = ([line for line in lines if line.get("step") == step] for step in ("quantize", "recover"))
    assert len(before) == len(after) == 21
    for first, second in zip(before, sorted(after, key=lambda line: before.index(_same(before, line))), strict=True):
        assert second["error"] < first["error"] and second["bits"] > first["bits"]
    if plain:
        model = AutoModelForCausalLM.from_pretrained(folder)
        layer = "model.layers.1.mlp.up_proj"
        view, added = open_weights(out), load_file(out / "adapter" / "adapter_model.safetensors")
        a, b = (added[f"base_model.model.{layer}.lora_{x}.weight"].float() for x in "AB")
        config.pop(KEY)
        (out / "config.json").write_text(json.dumps(config))
        base = open_weights(out).read(f"{layer}.weight").float()
        torch.testing.assert_close(view.read(f"{layer}.weight").float(), base + b @ a, atol=1e-3, rtol=1e-2)
        dense = model.get_submodule(layer).weight.float()
        assert (base + b @ a - dense).norm() < (base - dense).norm()
    remove_adapter(out)
    assert lacking(out, folder, result) == "a weight file"


class Interrupting(Reporter):
    """Stops a run after two blocks."""

    @contextmanager
    def stage(self, title, total):
        yield Ending(self, title, total)


class Ending(Stage):
    def step(self, note=""):
        super().step(note)
        if (self.title, self.done) == ("block", 2):
            raise KeyboardInterrupt


@pytest.mark.parametrize("bits", [2, 16])
def test_a_run_that_was_killed_ends_with_the_same_corrections(tmp_path, llama_folder, text_file, bits):
    flags = {
        "model": str(llama_folder),
        "calib": {"source": str(text_file), "nsamples": 2, "seqlen": 32},
        "target": {"wbits": 2, "group_size": 32},
        "quantizer": "rtn",
        "recover": ["low-rank"],
        "adapter_bits": bits,
        "options": {"low-rank": {"rank": 4}},
    }
    recipe = read_recipe(None, flags)
    compress(recipe, llama_folder, tmp_path / "straight", Reporter(quiet=True))
    with pytest.raises(KeyboardInterrupt):
        compress(recipe, llama_folder, tmp_path / "out", Interrupting(quiet=True))
    compress(recipe, llama_folder, tmp_path / "out", Reporter(quiet=True))
    for file in ("model.safetensors", json.loads((tmp_path / "out" / "config.json").read_text())[KEY]):
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def _same(lines, wanted):
    return next(line for line in lines if line["layer"] == wanted["layer"])


def test_the_card_says_how_to_load_it():
    facts = {"name": "mine", "format": "gptq", "path": "/tmp/mine"}
    card = model_card(facts | {"adapter": "adapter/adapter_model.safetensors"})
    assert 'PeftModel.from_pretrained(model, "/tmp/mine/adapter")' in card and 'from_pretrained("/tmp/mine")' in card
    own = model_card(facts | {"adapter": "adapter/corrections.safetensors"})
    assert "PeftModel" not in own and "compress generate /tmp/mine" in own
    assert "adapter" not in model_card(facts) and "peft" not in model_card(facts)
