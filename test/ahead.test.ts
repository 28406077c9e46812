/** Which requests may let the device take several steps by itself. */
import test from 'ava';
import type { GenerateOptions, SamplerPolicy } from 'diffusion-native';

import { goesAhead } from '../lib/ahead.js';
import { resolveConfig } from '../lib/config.js';
import type { Engine } from '../lib/engine.js';
import type { LengthRule } from '../lib/length/method.js';
import { resolveOptions } from '../lib/options.js';
import { smallConfig } from './helpers/models.js';

const config = resolveConfig(smallConfig);
const withLoop = { deviceLoop: true } as Engine;

function ahead(options: GenerateOptions, rule: Partial<LengthRule> | null = null, engine = withLoop): boolean {
	return goesAhead(engine, resolveOptions({ stepsPerCall: 8, ...options }, config), rule as LengthRule | null);
}

test('samplers whose steps the device knows go ahead, with a length found at the first step too', (t) => {
	for (const sampler of ['ancestral', 'confidence', 'threshold', 'factor', 'entropy-bound'] as const) {
		t.true(ahead({ sampler }), sampler);
		t.true(ahead({ sampler }, { method: 'expected', looks: true }), sampler);
	}
});

test('single steps are taken where the device could not know what comes next', (t) => {
	const own: SamplerPolicy = { decide: ({ open }) => ({ commit: [open[0] as number] }) };
	for (const sampler of ['klass', 'revocable', 'first-hitting', 'autoregressive', own] as const) {
		t.false(ahead({ sampler }), typeof sampler === 'string' ? sampler : 'a policy of its own');
	}
	t.false(ahead({ sampler: 'confidence', guidance: 1 }), 'guidance');
	t.false(ahead({ sampler: 'confidence', block: 8, cache: 'prefix' }), 'cache');
	t.false(ahead({ sampler: 'confidence', stepsPerCall: 1 }), 'one step a call');
	t.false(ahead({ sampler: 'confidence' }, { adapt: {} as LengthRule['adapt'] & object }), 'a canvas that follows');
	t.false(ahead({ sampler: 'confidence' }, { exact: true }), 'a drawn length, whose end token is given');
	t.false(ahead({ sampler: 'confidence' }, null, { deviceLoop: false } as Engine), 'a device without the loop');
});
