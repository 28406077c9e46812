"""The same work as native/bench/bench_gpu.cpp in PyTorch: GPT-2 124M in bf16, compiled, scaled_dot_product_attention, the
head on masked rows only, fused AdamW. One line of JSON per case. Needs a CUDA device and torch; run by bench/gpu.sh."""

import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

L, H, C, V, P = 12, 12, 768, 50257, 1024


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.out = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        x = x + self.proj(a)
        return x + self.out(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class Gpt2(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(P, C)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.lnf = nn.LayerNorm(C)

    def hidden(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.lnf(x)

    def forward(self, ids, rows, targets=None):
        hidden = self.hidden(ids).flatten(0, 1)
        if targets is None:
            return self.statistics(hidden, rows)
        return F.cross_entropy(F.linear(hidden[rows], self.wte.weight).float(), targets)

    def statistics(self, hidden, rows):
        logits = F.linear(hidden[rows], self.wte.weight).float()
        log_total = torch.logsumexp(logits, -1, keepdim=True)
        p = torch.exp(logits - log_total)
        best = p.topk(2, -1)
        entropy = log_total[:, 0] - (p * logits).sum(-1)
        return best.indices[:, 0], best.values[:, 0], best.values[:, 0] - best.values[:, 1], entropy, torch.multinomial(p, 1)


def measure(name, tokens, call, repeats=10):
    for _ in range(4):
        call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    line = {"name": name, "ms": median * 1e3, "fastest_ms": min(times) * 1e3, "slowest_ms": max(times) * 1e3}
    if tokens:
        line["tokens_per_second"] = round(tokens / median)
    print(json.dumps(line), flush=True)


def main():
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    model = Gpt2().cuda()
    compiled = torch.compile(model, dynamic=False)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    for T in (512, 1024):
        # 64 Ki tokens a step in two micro-batches: the logits of all rows at once are too large.
        B, parts = 65536 // T // 2, 2
        ids = torch.randint(V, (B, T), device="cuda")
        rows = torch.arange(0, B * T, 2, device="cuda")
        targets = torch.randint(V, (len(rows),), device="cuda")

        def step():
            optimiser.zero_grad(set_to_none=True)
            for _ in range(parts):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = compiled(ids, rows, targets)
                (loss / parts).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()

        measure(f"training/T{T}", B * T * parts, step)

    model.to(torch.bfloat16).eval()
    half, half_hidden, half_statistics = (
        torch.compile(part, dynamic=False) for part in (model, model.hidden, model.statistics)
    )
    for B, T in ((1, 256), (1, 1024), (64, 256), (64, 1024)):
        ids = torch.randint(V, (B, T), device="cuda")
        chunk = 8192
        pieces = [p for p in torch.arange(0, B * T, 2, device="cuda").split(chunk)]

        @torch.no_grad()
        def denoise():
            # One call where the rows fit; otherwise the head in chunks, as anybody would have to.
            if len(pieces) == 1:
                return half(ids, pieces[0])
            states = half_hidden(ids).flatten(0, 1)
            for rows in pieces:
                half_statistics(states, rows)

        measure(f"denoise/B{B}/T{T}", 0, denoise)


if __name__ == "__main__":
    main()
