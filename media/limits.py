"""What each number of a Config may be, so that an impossible one is refused before anything slow begins."""

import dataclasses
import math

from media.console import UserError

SIZES = "dim cond_dim hidden kernel_size num_scales steps_per_scale batch_size seq_len eval_interval"


def check_config(config):
    """Raises UserError with the flag, the value and what it may be."""
    for field in dataclasses.fields(config):  # a file may claim anything
        value, kind = getattr(config, field.name), field.type
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, int) and abs(value) >= 2**63):
            raise UserError(f"{field.name}: {str(value)[:40]} vs {kind.__name__}. Change --{field.name}")
    L, least = config.num_scales, 2**config.num_scales
    whole = config.dilations and all(isinstance(d, int) and d >= 1 for d in config.dilations)
    for names, holds, expected in (
        (SIZES, lambda v: v >= 1, "at least 1"),
        ("lead steps epochs warmup weight_decay", lambda v: 0 <= v < math.inf, "0 or more"),
        ("mean_loss mean_hidden noise tilt", lambda v: 0 <= v < math.inf, "0 or more"),
        ("lr mean_lr grad_clip scale_bound", lambda v: 0 < v < math.inf, "above 0"),
        ("dropout", lambda v: 0 <= v < 1, "0 or more and below 1"),
        ("lr_final mean_loss_final vtlp channel", lambda v: 0 <= v <= 1, "between 0 and 1"),
        ("prior", lambda v: v in ("ar2", "iid"), "ar2 or iid"),
        ("init", lambda v: v in ("data", "random"), "data or random"),
        ("precision", lambda v: v in ("auto", "float32", "bfloat16"), "auto, float32 or bfloat16"),
        ("dilations", lambda v: whole, "one or more whole numbers, each at least 1"),
        ("lambdas", lambda v: len(v) == L, f"one for each of the {L} scales"),
        ("lambdas", lambda v: all(0 < x < 1e18 for x in v), "above 0"),
        ("dim", lambda v: v >= least, f"at least 2^num_scales = {least}"),
        ("steps", lambda v: v or config.epochs, "steps or epochs above 0"),
        ("seed", lambda v: 0 <= v < 2**63, "0 or more and below 2^63"),
    ):
        for name in names.split():
            if not holds(getattr(config, name)):
                raise UserError(f"{name}: {getattr(config, name)} vs {expected}. Change --{name}")
