"""The README.md of a compressed model: what it is, what was measured, and the line that loads it."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, StrictUndefined

from compress.checkpoint.adapter import OWN

TEMPLATE = """\
---
{% if base_model %}
base_model: {{ base_model | tojson }}
{% endif %}
{% if license %}
license: {{ license | tojson }}
{% endif %}
library_name: transformers
pipeline_tag: text-generation
tags:
- compress
{% if format != "dense" %}
- {{ format }}
{% endif %}
---
# {{ name }}

{{ base_model or "A model" }}, compressed by `compress`{{ " " ~ version if version }}.
{% if command %}

```
{{ command }}
```
{% endif %}
{% if recipe %}

The recipe, in full:

```toml
{{ recipe.strip() }}
```
{% endif %}
{% if rows %}

## Measured

| | dense | compressed |
|---|---|---|
{% for row in rows %}
| {{ row | join(" | ") }} |
{% endfor %}
{% endif %}

## Loading

{{ loading }}

## Limits

{% for limit in limits %}
- {{ limit }}
{% endfor %}
"""

PLAIN = """\
```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{path}")
```"""

DEQUANTIZED = """\
```python
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
as_dense = CompressedTensorsConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained("{path}", quantization_config=as_dense)
```"""

NATIVE = """\
```python
import compress.hf  # transformers knows the layout after this, and stops without it
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{path}")
```"""

COMMAND = """\
```
compress generate {path} "Once upon a time"
```"""

ADAPTED = """\
The folder adapter/ belongs to the weights, which are worse without it. It is a LoRA adapter for `peft`, put on the model
that was loaded above; `compress` adds it by itself:

```python
from peft import PeftModel
model = PeftModel.from_pretrained(model, "{path}/adapter")
```"""

CORRECTED = """\
The folder adapter/ belongs to the weights, which are worse without it. It is in compress's own layout, which only
compress adds:

{command}"""

ALWAYS = (
    "The limits, biases and licence of the base model remain.",
    "Perplexity on one text says little about other languages and tasks: measure what you need before you rely on it.",
)


def model_card(facts: Mapping[str, Any]) -> str:
    """The text of README.md. Of `facts` only "format" has to be there; what is missing is left out.

    "name", "base_model", "license", "version", "command", "recipe" (TOML), "format", "quantization_config" (as in
    config.json), "adapter" (as there), "path" (what to load, by default the name), "perplexity" ({text: {"dense": x, "compressed": y}}),
    "bytes" ({"dense": n, "compressed": m}), "bits_per_weight" and "sparsity" or "removed" (numbers, of the compressed
    model), and "limits" (sentences, before those that always hold).
    """
    name = facts.get("name") or "Compressed model"
    path = facts.get("path") or name
    known = dict.fromkeys(("base_model", "license", "version", "command", "recipe")) | dict(facts)
    known |= {
        "name": name,
        "rows": _rows(facts),
        "loading": loading(facts["format"], facts.get("quantization_config") or {}, path, facts.get("adapter")),
        "limits": [*facts.get("limits", ()), *ALWAYS],
    }
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return environment.from_string(TEMPLATE).render(known)


def loading(format_name: str, quantization_config: Mapping[str, Any], path: str, adapter: str | None = None) -> str:
    """Markdown on how to load a checkpoint, and its adapter (the file, as in config.json)."""
    weights = _loading_weights(format_name, quantization_config, path)
    if adapter is None:
        return weights
    if adapter.endswith(OWN):
        return CORRECTED.format(command=COMMAND.format(path=path))
    return weights if format_name == "native" else f"{weights}\n\n{ADAPTED.format(path=path)}"


def _loading_weights(format_name: str, quantization_config: Mapping[str, Any], path: str) -> str:
    """How to load a checkpoint of this format, tried with transformers 5.23 and compressed-tensors 0.20."""
    if format_name == "native":
        return f"In compress's own layout:\n\n{NATIVE.format(path=path)}\n\n{COMMAND.format(path=path)}"
    if format_name == "gptq":
        return f"With `gptqmodel` and `optimum` installed, or in vLLM:\n\n{PLAIN.format(path=path)}"
    if format_name == "compressed-tensors":
        return _loading_compressed_tensors(quantization_config, path)
    return PLAIN.format(path=path)


def _loading_compressed_tensors(quantization_config: Mapping[str, Any], path: str) -> str:
    """Which line works depends on the groups.

    The plain one makes no room for packed zero points; the dequantizing one decodes every layer as the first group's.
    """
    groups = quantization_config.get("config_groups", {}).values()
    symmetric = all(group["weights"]["symmetric"] for group in groups)
    start = "With `compressed-tensors` 0.19 or later installed"
    if symmetric:
        warning = "\n\nDo not ask for `dequantize=True`: transformers 5.23 then takes all layers for the first kind's."
        return f"{start}, or in vLLM:\n\n{PLAIN.format(path=path)}{warning if len(groups) > 1 else ''}"
    if len(groups) == 1:
        return f"{start} (vLLM needs no second line):\n\n{DEQUANTIZED.format(path=path)}"
    return (
        "In vLLM, or by compress. Its layers are quantized in several asymmetric ways, which transformers 5.23 "
        f"cannot load:\n\n{COMMAND.format(path=path)}"
    )


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lines of the table: what, dense, compressed."""
    rows: list[tuple[str, ...]] = []
    for text, values in (facts.get("perplexity") or {}).items():
        rows.append((f"perplexity, {text}", *(_number(values.get(kind), "{:.3f}") for kind in ("dense", "compressed"))))
    if size := facts.get("bytes"):
        rows.append(("size", *(_size(size.get(kind)) for kind in ("dense", "compressed"))))
    for key, title, pattern in (
        ("bits_per_weight", "bits per weight", "{:.2f}"),
        ("sparsity", "weights that are zero", "{:.1%}"),
        ("removed", "weights taken out of the blocks", "{:.1%}"),
    ):
        if facts.get(key) is not None:
            rows.append((title, "", _number(facts[key], pattern)))
    return rows


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None else pattern.format(value)


def _size(nbytes: float | None) -> str:
    """With three figures and a unit: 1.25 GB."""
    if nbytes is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
