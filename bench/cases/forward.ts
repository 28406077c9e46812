/** One bidirectional forward: with logits at all positions, and without the head. */
import type { BenchCase } from '../harness.js';
import { forwardFlops, load, type ShapeName, someTokens, type WeightType } from '../shapes.js';

function forward(
	shape: ShapeName,
	T: number,
	output: 'logits' | 'hidden',
	repeats: number,
	dtype: WeightType = 'fp32',
): BenchCase {
	return {
		name: `forward/${shape}/T${T}/${output}${dtype === 'fp32' ? '' : `/${dtype}`}`,
		shape: { model: shape, T },
		dtype,
		repeats,
		async setup() {
			const model = await load(shape, dtype);
			const tokens = someTokens(shape, T);
			let last: Float32Array[] = [];
			return {
				async run() {
					last = await model.forward(tokens, { output, reuse: last });
					return { tokens: T, flops: forwardFlops(shape, T, output === 'logits' ? T : 0) };
				},
				teardown: () => model.dispose(),
			};
		},
	};
}

export const forwardCases: BenchCase[] = [
	forward('gpt2', 64, 'logits', 15),
	forward('gpt2', 256, 'logits', 9),
	forward('gpt2', 256, 'hidden', 9),
	forward('gpt2', 1024, 'logits', 5),
	forward('small', 256, 'logits', 15),
	forward('tiny', 256, 'logits', 15),
	forward('gpt2', 256, 'logits', 9, 'bf16'),
	forward('gpt2', 256, 'logits', 9, 'int8'),
	forward('gpt2', 256, 'hidden', 9, 'int8'),
	forward('gpt2', 1024, 'logits', 5, 'int8'),
	forward('small', 256, 'logits', 15, 'int8'),
];
