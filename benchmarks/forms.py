"""Measures the limits in `jax_fused_lora/forms.py`: every form of a layer against the others.

    python benchmarks/forms.py [--dtype float32] [--direction forward] [--widths 512 1024 2048]

Prints, per number of rows, the microseconds a layer of each form took, the forms of a row in turns
in one run, and the one that the rule chooses. With forward+backward the forward form is the rule's
and the backward form varies.
"""

import argparse
from unittest import mock

import numpy as np

from jax_fused_lora import bench, forms
from jax_fused_lora.cases import DIRECTIONS, DTYPES, Case

FORMS = ("kernel", "base", "xla")
ROWS = (8, 16, 32, 64, 96, 128, 192, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--direction", choices=DIRECTIONS, default="forward")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0, help="per line")
    options = parser.parse_args()
    bench.keep_freed_memory()
    varied = "backward_form" if options.direction == "forward+backward" else "forward_form"
    for width in options.widths:
        for rows in options.rows:
            case = Case(
                "lora_linear", rows, width, width, options.rank, options.dtype, options.direction
            )
            sides = {}
            for form in FORMS:
                with mock.patch.object(forms, varied, lambda *_, form=form, **__: form):
                    sides[form] = bench.sides_of(case)["ours"]
                    sides[form]()  # traced, and so the form is chosen, here
            times = bench.microseconds(case, bench.interleave(sides, options.seconds))
            medians = {form: np.median(each) for form, each in times.items()}
            best = min(medians, key=medians.__getitem__)
            figures = "  ".join(f"{form} {us:9,.0f}" for form, us in medians.items())
            print(
                f"{case.shape:>18}  {figures}  best {best:6}  rule {bench.route(case)}", flush=True
            )


if __name__ == "__main__":
    main()
