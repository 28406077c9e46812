"""GPT-2 and the masked-diffusion objective in plain PyTorch, written from the formulas and independent of the library.

Regenerates test/fixtures/reference/: run `python3 test/reference/reference.py` (needs PyTorch and NumPy; the tests
themselves read only the committed files). Every file is safetensors, fp32; integers are stored as fp32 values.
"""

import json
import math
import os
import struct

import numpy as np
import torch

torch.set_num_threads(1)
OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), '..', 'fixtures', 'reference')


def write_safetensors(path, tensors, metadata=None):
    header, data, offset = {}, [], 0
    if metadata:
        header['__metadata__'] = metadata
    for name, value in tensors.items():
        array = np.ascontiguousarray(value.detach().numpy() if torch.is_tensor(value) else value, dtype='<f4')
        header[name] = {'dtype': 'F32', 'shape': list(array.shape), 'data_offsets': [offset, offset + array.nbytes]}
        offset += array.nbytes
        data.append(array.tobytes())
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text + b''.join(data))


def make_weights(seed, layers, channels, vocab, context):
    """Larger than GPT-2's initialisation, so that logits are of order 10 and every parameter matters."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, std):
        return torch.randn(*shape, generator=g) * std

    w = {'wte.weight': normal(vocab, channels, std=0.6), 'wpe.weight': normal(context, channels, std=0.3)}
    for i in range(layers):
        p = f'h.{i}.'
        for ln in ('ln_1', 'ln_2'):
            w[p + ln + '.weight'] = 1 + normal(channels, std=0.2)
            w[p + ln + '.bias'] = normal(channels, std=0.2)
        for name, rows, cols in (('attn.c_attn', channels, 3 * channels), ('attn.c_proj', channels, channels),
                                 ('mlp.c_fc', channels, 4 * channels), ('mlp.c_proj', 4 * channels, channels)):
            w[p + name + '.weight'] = normal(rows, cols, std=1.5 / math.sqrt(rows))
            w[p + name + '.bias'] = normal(cols, std=0.2)
    w['ln_f.weight'] = 2.5 + normal(channels, std=0.3)
    w['ln_f.bias'] = normal(channels, std=0.2)
    return w


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def forward(w, ids, heads, layers, visible):
    """ids (T), visible (T, T) bool -> logits (T, V)."""
    T = ids.shape[0]
    x = w['wte.weight'][ids] + w['wpe.weight'][:T]
    C = x.shape[1]
    HS = C // heads
    for i in range(layers):
        p = f'h.{i}.'
        a = layer_norm(x, w[p + 'ln_1.weight'], w[p + 'ln_1.bias'])
        qkv = a @ w[p + 'attn.c_attn.weight'] + w[p + 'attn.c_attn.bias']
        q, k, v = (part.reshape(T, heads, HS).transpose(0, 1) for part in qkv.split(C, dim=1))
        scores = (q @ k.transpose(1, 2)) / math.sqrt(HS)
        scores = scores.masked_fill(~visible, float('-inf'))
        out = (torch.softmax(scores, -1) @ v).transpose(0, 1).reshape(T, C)
        x = x + out @ w[p + 'attn.c_proj.weight'] + w[p + 'attn.c_proj.bias']
        m = layer_norm(x, w[p + 'ln_2.weight'], w[p + 'ln_2.bias'])
        m = gelu(m @ w[p + 'mlp.c_fc.weight'] + w[p + 'mlp.c_fc.bias'])
        x = x + m @ w[p + 'mlp.c_proj.weight'] + w[p + 'mlp.c_proj.bias']
    x = layer_norm(x, w['ln_f.weight'], w['ln_f.bias'])
    return x @ w['wte.weight'].T


def causal(T):
    return torch.ones(T, T, dtype=torch.bool).tril()


def full(T):
    return torch.ones(T, T, dtype=torch.bool)


def block_causal(T, block):
    b = torch.arange(T) // block
    return b[None, :] <= b[:, None]


def doubles(w):
    return {k: v.double() for k, v in w.items()}


def config_json(layers, heads, channels, vocab, context):
    return {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], 'n_layer': layers, 'n_head': heads, 'n_embd': channels,
            'vocab_size': vocab, 'n_positions': context, 'n_ctx': context, 'activation_function': 'gelu_new',
            'layer_norm_epsilon': 1e-5, 'bos_token_id': vocab - 1, 'eos_token_id': vocab - 1}


def model_directory(name, w, layers, heads, channels, vocab, context):
    directory = os.path.join(OUT, name)
    os.makedirs(directory, exist_ok=True)
    with open(os.path.join(directory, 'config.json'), 'w') as file:
        json.dump(config_json(layers, heads, channels, vocab, context), file, indent=1)
        file.write('\n')
    write_safetensors(os.path.join(directory, 'model.safetensors'), {'transformer.' + k: v for k, v in w.items()}, {'format': 'pt'})


def logits_case(name, seed, layers, heads, channels, vocab, context, lengths, stride):
    """Logits of one random sequence per length, full, causal and block-causal; long ones keep every stride-th row."""
    w = make_weights(seed, layers, channels, vocab, context)
    model_directory(name, w, layers, heads, channels, vocab, context)
    g = torch.Generator().manual_seed(seed + 1)
    tensors = {}
    with torch.no_grad():
        for T in lengths:
            ids = torch.randint(0, vocab, (T,), generator=g)
            rows = torch.arange(0, T, stride if T > 64 else 1)
            tensors[f'ids.{T}'] = ids.float()
            tensors[f'rows.{T}'] = rows.float()
            for kind, visible in (('full', full(T)), ('causal', causal(T)), ('block4', block_causal(T, 4))):
                tensors[f'{kind}.{T}'] = forward(doubles(w), ids, heads, layers, visible)[rows].float()
    write_safetensors(os.path.join(OUT, name, 'expected.safetensors'), tensors)
    print(name, 'largest logit', max(float(v.abs().max()) for k, v in tensors.items() if k.startswith('full')))


def diffusion_loss(w, batch, heads, layers, mask_id, normalise, visible):
    """The weighted masked cross-entropy of algorithms: sum of (1/t) CE over masked, predictable tokens, and its divisor.

    batch: list of (ids, maskable, mask, t). Under the shift row i - 1 predicts token i, so token 0 is never predicted.
    """
    numerator, unweighted, tokens, masked, answers = 0, 0, 0, 0, 0
    for ids, maskable, mask, t in batch:
        noisy = torch.where(mask, torch.full_like(ids, mask_id), ids)
        logits = forward(w, noisy, heads, layers, visible(len(ids)))
        ce = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction='none')
        chosen = mask[1:].to(ce.dtype)
        predictable = maskable[1:].sum()
        weight = 1.0 / t
        if normalise == 'answer' and predictable > 0:
            weight = weight / float(predictable)
        numerator = numerator + weight * (ce * chosen).sum()
        unweighted = unweighted + (ce * chosen).sum()
        tokens += int(predictable)
        masked += int(chosen.sum())
        answers += int(predictable > 0)
    divisor = {'tokens': tokens, 'masked': masked, 'answer': answers}[normalise]
    return numerator / divisor, unweighted, masked, tokens


def autoregressive_loss(w, batch, heads, layers):
    total, count = 0, 0
    for ids, maskable, _, _ in batch:
        logits = forward(w, ids, heads, layers, causal(len(ids)))
        ce = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction='none')
        chosen = maskable[1:].to(ce.dtype)
        total = total + (ce * chosen).sum()
        count += int(chosen.sum())
    return total / count, total, count, count


def training_case(name, seed, layers, heads, channels, vocab, context, lengths):
    """Loss, every gradient, and the parameters after 10 AdamW steps on the same batch, for each objective."""
    mask_id = 3
    w = make_weights(seed, layers, channels, vocab, context)
    model_directory(name, w, layers, heads, channels, vocab, context)
    g = torch.Generator().manual_seed(seed + 1)
    batch, tensors = [], {}
    for s, T in enumerate(lengths):
        ids = torch.randint(0, vocab, (T,), generator=g)
        maskable = torch.ones(T, dtype=torch.bool)
        maskable[:min(s, T - 2)] = False  # prompts of length 0, 1, 2, ...
        t = 0.3 + 0.2 * s
        mask = (torch.rand(T, generator=g) < t) & maskable
        mask[-1] = True
        batch.append((ids, maskable, mask, t))
        tensors[f'ids.{s}'] = ids.float()
        tensors[f'maskable.{s}'] = maskable.float()
        tensors[f'mask.{s}'] = mask.float()
    tensors['t'] = torch.tensor([b[3] for b in batch])
    tensors['mask_id'] = torch.tensor([float(mask_id)])
    objectives = {
        'tokens': lambda p: diffusion_loss(p, batch, heads, layers, mask_id, 'tokens', full),
        'masked': lambda p: diffusion_loss(p, batch, heads, layers, mask_id, 'masked', full),
        'answer': lambda p: diffusion_loss(p, batch, heads, layers, mask_id, 'answer', full),
        'autoregressive': lambda p: autoregressive_loss(p, batch, heads, layers),
    }
    for kind, objective in objectives.items():
        p = {k: v.double().clone().requires_grad_(True) for k, v in w.items()}
        loss, unweighted, masked, tokens = objective(p)
        loss.backward()
        tensors[f'{kind}.loss'] = torch.stack([loss.detach(), unweighted.detach(), torch.tensor(masked).double(),
                                               torch.tensor(tokens).double()]).float()
        if kind in ('tokens', 'autoregressive'):
            for k, v in p.items():
                tensors[f'{kind}.grad.{k}'] = v.grad.float()
    p = {k: v.double().clone().requires_grad_(True) for k, v in w.items()}
    decayed = [v for v in p.values() if v.dim() >= 2]
    others = [v for v in p.values() if v.dim() < 2]
    optimiser = torch.optim.AdamW([{'params': decayed, 'weight_decay': 0.1}, {'params': others, 'weight_decay': 0.0}],
                                  lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for _ in range(10):
        optimiser.zero_grad()
        loss = objectives['tokens'](p)[0]
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(list(p.values()), 1.0)))
        optimiser.step()
        losses.append(float(loss))
    tensors['adamw.losses'] = torch.tensor(losses)
    tensors['adamw.norms'] = torch.tensor(norms)
    for k, v in p.items():
        tensors[f'adamw.{k}'] = v.detach().float()
    write_safetensors(os.path.join(OUT, name, 'expected.safetensors'), tensors)
    print(name, 'losses', [round(x, 4) for x in losses])


if __name__ == '__main__':
    os.makedirs(OUT, exist_ok=True)
    logits_case('logits-small', 11, layers=2, heads=2, channels=32, vocab=37, context=1024, lengths=(1, 2, 7, 65, 1024), stride=61)
    logits_case('logits-odd', 12, layers=3, heads=3, channels=60, vocab=101, context=40, lengths=(1, 5, 40), stride=1)
    training_case('training', 13, layers=2, heads=2, channels=32, vocab=41, context=24, lengths=(24, 9, 2, 13))
