"""PyTorch as a contender: answers the requests of bench/peers/channel.ts, one line of JSON each. It does what its users do:
logits at all positions in training, and in sampling a full sort of every row for top-p, as DiffuLLaMA's code does."""

import json
import math
import os
import pathlib
import resource
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def tokens_of(vocab, T, sequence=0):
    """The ids of bench/peers/inputs.ts."""
    return torch.tensor([((i + sequence * 1021) * 7919 + 13) % vocab for i in range(T)])


def check_blas():
    """Refuses Debian's reference BLAS, with which PyTorch takes fifty times as long as its users know it."""
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and "/blas/libblas.so" in maps.read_text():
        raise RuntimeError("PyTorch multiplies with the reference BLAS: apt-get install libopenblas0-openmp")


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), as GPT-2 stores it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Block(nn.Module):
    def __init__(self, C, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": Conv1D(C, 3 * C), "c_proj": Conv1D(C, C)})
        self.mlp = nn.ModuleDict({"c_fc": Conv1D(C, 4 * C), "c_proj": Conv1D(4 * C, C)})

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.heads, C // self.heads).transpose(1, 2)
            for part in self.attn["c_attn"](self.ln_1(x)).split(C, 2)
        )
        shares = F.softmax((q @ k.transpose(-2, -1)) * (C // self.heads) ** -0.5, -1)
        x = x + self.attn["c_proj"]((shares @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self, layers, heads, channels, vocab, context):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, channels), nn.Embedding(context, channels)
        self.h = nn.ModuleList(Block(channels, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(channels)

    def forward(self, ids, output="logits"):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        x = self.ln_f(x)
        return F.linear(x, self.wte.weight) if output == "logits" else x


def read_safetensors(path):
    """fp32 tensors by name, without a 'transformer.' before it."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    data = np.memmap(path, np.uint8, "r", 8 + size)
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        assert entry["dtype"] == "F32", f"{path}: {name} is {entry['dtype']}"
        values = np.frombuffer(data[begin:end].tobytes(), np.float32).reshape(entry["shape"])
        tensors[name.removeprefix("transformer.")] = torch.from_numpy(values.copy())
    return tensors


def sample(values):
    """The entries of a (rows, columns) result that contenders compare."""
    rows, columns = values.shape
    return [values[row, k * 997 % columns].item() for row in (0, 1, rows // 2, rows - 1) for k in range(64)]


def keep_top_p(logits, p):
    """DiffuLLaMA's nucleus filter."""
    ordered, places = torch.sort(logits, descending=True)
    drop = torch.cumsum(F.softmax(ordered, dim=-1), dim=-1) > p
    drop[..., 1:] = drop[..., :-1].clone()
    drop[..., 0] = 0
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, places, drop)
    return logits.masked_fill(dropped, torch.finfo(logits.dtype).min)


class Contender:
    def open(self, opening):
        check_blas()
        torch.set_num_threads(opening["threads"])
        torch.manual_seed(1)
        config = opening["config"]
        self.vocab = config["vocab"]
        self.mask_id = config["maskId"]
        self.model = Gpt2(config["layers"], config["heads"], config["channels"], self.vocab, config["context"])
        self.model.load_state_dict(read_safetensors(os.path.join(opening["path"], "model.safetensors")))
        return {"version": f"PyTorch {torch.__version__}"}

    def prepare(self, job):
        self.job = job
        return getattr(self, "prepare_" + job["kind"])(job)

    def prepare_forward(self, job):
        self.model.eval()
        ids = tokens_of(self.vocab, job["T"])[None]

        def forward():
            with torch.inference_mode():
                return self.model(ids, job["output"])

        self.work = forward
        return sample(forward()[0])

    def prepare_train(self, job):
        self.model.train()
        B, T, t = job["B"], job["T"], 0.5
        ids = torch.stack([tokens_of(self.vocab, T, s) for s in range(B)])
        masked = (torch.arange(T) % 2 == 1).expand(B, T)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        vectors = [p for p in self.model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), eps=1e-8)

        def step():
            logits = self.model(ids.masked_fill(masked, self.mask_id))[:, :-1]
            losses = F.cross_entropy(logits.reshape(-1, self.vocab), ids[:, 1:].reshape(-1), reduction="none")
            loss = (losses * masked[:, 1:].reshape(-1) / t).sum() / (B * (T - 1))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            return loss.item()

        self.work = step
        return [step(), step()]

    def prepare_sample(self, job):
        self.model.eval()
        T, steps = job["T"], job["steps"]
        measured = job.get("measured", steps)

        def generate(count):
            x = torch.zeros(1, T, dtype=torch.long)
            maskable = torch.ones_like(x, dtype=torch.bool)
            canvas = x.masked_fill(maskable, self.mask_id)

            def step():
                logits = keep_top_p(self.model(canvas) / job["temperature"], job["topP"])
                scores = torch.log_softmax(logits, -1)
                drawn = torch.distributions.Categorical(logits=scores).sample()
                torch.gather(scores, -1, drawn.unsqueeze(-1)).squeeze(-1)
                shifted = torch.cat([x[:, 0:1], drawn[:, :-1]], 1)
                return canvas.masked_scatter(maskable, shifted[maskable])

            with torch.no_grad():
                found = step()
                for t in range(steps - 1, steps - count, -1):
                    chosen = maskable & (torch.rand_like(found, dtype=torch.float) < 1 / (t + 1))
                    canvas.masked_scatter_(chosen, found[chosen])
                    maskable = maskable.masked_fill(chosen, False)
                    found = step()

        generate(2)
        self.work = lambda: generate(measured)
        self.scaled = steps / measured
        with torch.inference_mode():
            return sample(self.model(tokens_of(self.vocab, T)[None])[0])

    def run(self, count):
        timings = []
        scaled = getattr(self, "scaled", 1) if self.job["kind"] == "sample" else 1
        for _ in range(count):
            started = time.perf_counter()
            self.work()
            ms = (time.perf_counter() - started) * 1e3 * scaled
            timings.append({"ms": ms} if scaled == 1 else {"ms": ms, "scaled": scaled})
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"timings": timings, "peakRssBytes": peak}


def main():
    contender = Contender()
    for line in sys.stdin:
        request = json.loads(line)
        number = request.pop("id")
        ((name, argument),) = request.items()
        try:
            value = getattr(contender, name)(argument)
            if name == "prepare" and not all(map(math.isfinite, value)):
                raise ValueError("the result is not finite")
            reply = {"value": value}
        except Exception as error:  # whatever it is, the benchmark reports it
            reply = {"error": f"{type(error).__name__}: {error}"}
        print("@" + json.dumps({"id": number, **reply}), flush=True)


if __name__ == "__main__":
    main()
