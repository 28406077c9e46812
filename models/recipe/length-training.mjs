// The stage `training` of measure-length.mjs: a fresh model is fine-tuned with each padding and mask that are compared, and the
// bounds of what came out are scored.
import { evaluateLength, Trainer, textReport } from 'diffusion-native';

const recipes = [...['none', 'padding', 'padding row of its own', 'end always masked', 'prompt + mask + end + mask']];

/** What the training recipe adds: the model fine-tuned with different paddings and masks, then its bounds. */
export const training = {
	uses: ['steps', 'training'],
	parts: (context) =>
		recipes.map((recipe) => [
			recipe,
			async () => {
				const { max, steps, training: limit } = context.settings;
				// The token of byte 0, which no text has, is the padding row that is trained anew.
				const own = recipe === 'padding row of its own';
				const tuned = await context.fresh(own ? (tokenizer) => ({ padId: tokenizer.encode('\0')[0] }) : undefined);
				await fineTune(tuned, context.read('train'), { recipe, steps, max, progress: context.progress(recipe) });
				const found = await evaluateLength(tuned, context.read('test').slice(0, limit), {
					...{ max, calibration: context.path('validation'), calibrationLimit: limit, generations: 0 },
					...{ coverage: [0.95], methods: ['constant', 'threshold', 'expected'] },
				});
				console.log(textReport(found));
				await tuned.dispose();
				return { recipe, pairs: found.pairs, signal: found.signal, bounds: found.bounds };
			},
		]),
};

async function fineTune(model, pairs, { recipe, steps, max, progress }) {
	const { config } = model;
	const trainer = new Trainer(model, { learningRate: 1e-4, weight: 'none', seed: 1 });
	let next = 0;
	for (let step = 0; step < steps; step++) {
		const batch = { tokens: [], maskable: [], mask: [], t: [] };
		while (batch.tokens.length < 32) {
			const pair = pairs[next++ % pairs.length];
			const begin = model.tokenizer.encode(pair.prompt).length;
			const answer = model.tokenizer.encode(`${pair.prompt} ${pair.answer}`);
			// Pseudo-random numbers of the step and row, the same for every recipe.
			const random = (k) => (((Math.sin(1 + 12.9898 * next + 78.233 * k) * 43758.5453) % 1) + 1) % 1;
			const padding = recipe === 'none' ? 0 : Math.floor((max + 1) ** random(0)) - 1;
			const size = Math.min(answer.length + 1 + padding, config.context);
			if (answer.length + 1 > size) continue;
			const tokens = new Int32Array(size).fill(config.padId);
			tokens.set(answer);
			tokens[answer.length] = config.eosId;
			const t = Math.max(1e-3, random(1));
			batch.tokens.push(tokens);
			batch.maskable.push(Uint8Array.from(tokens, (_, i) => Number(i >= begin)));
			batch.mask.push(
				Uint8Array.from(tokens, (_, i) => {
					if (i < begin) return 0;
					if (recipe === 'prompt + mask + end + mask') return Number(i !== answer.length);
					if (recipe === 'end always masked' && i >= answer.length) return 1;
					return Number(random(2 + i) < t);
				}),
			);
			batch.t.push(t);
		}
		await trainer.step(batch);
		progress({ stage: 'steps', fraction: step / steps });
	}
	await trainer.dispose();
}
