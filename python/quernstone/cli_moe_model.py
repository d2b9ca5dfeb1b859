"""The commands `quernstone moe pack` and `quernstone moe generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer, guarded: Any) -> None:
    """Adds the commands to those of `quernstone moe`.

    Args:
        guarded: runs a function of a console, and ends the process with 2 and one line where an
            argument or a file is wrong.
    """

    @app.command()
    def pack(
        checkpoint: Annotated[
            Path, typer.Argument(help="Folder with config.json and safetensors files.")
        ],
        out: Annotated[Path, typer.Argument(help="Folder to be made.")],
        format: Annotated[
            str, typer.Option("--format", help="Of the experts: int4, int8 or bf16.")
        ] = "int4",
        linear: Annotated[
            str,
            typer.Option("--linear", help="Of attention and output: int4, int8, bf16 or none."),
        ] = "int4",
        group: Annotated[
            int, typer.Option("--group", help="Inputs that share a scale of int4: 32, 64, 128.")
        ] = 32,
        zero_points: Annotated[
            bool, typer.Option("--zero-points", help="A zero point beside each scale of int4.")
        ] = False,
        clips: Annotated[
            int, typer.Option("--clips", min=1, help="Clipped ranges that are tried for a group.")
        ] = 4,
    ) -> None:
        """Packs a checkpoint of a mixture of experts, however large, one layer at a time."""

        def run(console: Any) -> None:
            from quernstone.moe.checkpoint import pack_checkpoint
            from quernstone.moe.hf import Packing

            packing = Packing(
                format,  # type: ignore[arg-type]
                group if "int4" in (format, linear) else None,
                zero_points,
                clips,
                None if linear == "none" else linear,  # type: ignore[arg-type]
            )

            def say(words: str) -> None:
                console.print(f"[dim]{words}[/dim]", highlight=False, soft_wrap=True)

            made = pack_checkpoint(checkpoint, out, packing, say=say)
            size = sum(path.stat().st_size for path in made.iterdir())
            console.print(f"{made}: {size / 1e6:.1f} MB", highlight=False, soft_wrap=True)

        guarded(run)

    @app.command()
    def generate(
        model: Annotated[Path, typer.Argument(help="Folder that `moe pack` has made.")],
        prompt: Annotated[str, typer.Argument(help="Text to go on from.")] = "",
        ids: Annotated[
            str | None,
            typer.Option("--ids", help="Token ids instead of a text, as 5,17,3; for no tokenizer."),
        ] = None,
        tokens: Annotated[int, typer.Option("--tokens", min=1, help="To write.")] = 64,
        memory: Annotated[
            str,
            typer.Option("--memory", help="Where experts are: huge, copy, or map: in the file."),
        ] = "huge",
        threads: Annotated[
            int | None, typer.Option("--threads", min=1, help="Of the CPU; torch's by default.")
        ] = None,
        sample: Annotated[
            bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")
        ] = False,
        seed: Annotated[int, typer.Option("--seed", min=0, help="Of the drawing.")] = 0,
    ) -> None:
        """Goes on from a prompt with a packed model."""

        def run(console: Any) -> None:
            import torch

            from quernstone.moe.checkpoint import load_packed

            if threads is not None:
                torch.set_num_threads(threads)
            if (ids is None) == (prompt == ""):
                raise ValueError("prompt: got both or neither of a text and --ids, expected one")
            tokenizer = None if ids is not None else _tokenizer(model)
            loaded: Any = load_packed(model, memory=memory)  # type: ignore[arg-type]
            with loaded.quernstone:
                if tokenizer is None:
                    given = _parsed(str(ids), loaded.config.vocab_size)
                else:
                    given = tokenizer(prompt, return_tensors="pt")["input_ids"]
                torch.manual_seed(seed)
                start = time.perf_counter()
                made = loaded.generate(
                    given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=tokens,
                    do_sample=sample,
                )
                seconds = time.perf_counter() - start
            new = made[0, given.shape[1] :].tolist()
            words = ",".join(map(str, new)) if tokenizer is None else tokenizer.decode(new)
            console.print(words, markup=False, highlight=False, soft_wrap=True)
            console.print(
                f"[dim]{len(new)} tokens in {seconds:.2f} s, the prompt of {given.shape[1]} "
                f"included[/dim]",
                highlight=False,
                soft_wrap=True,
            )

        guarded(run)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not any(path.name.startswith(("tokenizer", "vocab")) for path in folder.iterdir()):
        raise ValueError(f"{folder}: got no tokenizer, expected one, or --ids instead of a text")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _parsed(ids: str, vocabulary: int) -> Any:
    import torch

    try:
        numbers = [int(word) for word in ids.split(",")]
    except ValueError:
        raise ValueError(f"--ids: got {ids!r}, expected numbers between commas") from None
    if not all(0 <= number < vocabulary for number in numbers):
        raise ValueError(f"--ids: got {ids!r}, expected 0 to {vocabulary - 1}")
    return torch.tensor([numbers])
