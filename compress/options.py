"""What every method's options have in common."""

from pydantic import BaseModel, ConfigDict


class MethodOptions(BaseModel):
    """Options of one method: frozen, validated, each with a default and a description.

    They are set by `--set METHOD.KEY=VALUE` or a recipe's `[options.METHOD]`, and listed by `compress methods`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
