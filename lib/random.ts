/**
 * Counter-based randomness: Philox4x32-10, the same numbers as native/core/rng.h. A number is a pure function of
 * (seed, stream, step, index).
 */
import { Turns } from './turns.js';

/** What a number is used for; the values are part of the meaning of a seed (native/core/rng.h). */
export const Stream = { init: 1, time: 2, mask: 3, anneal: 4, draw: 5, order: 6, data: 7, count: 8 } as const;

function mulHigh(a: number, b: number): number {
	const aHigh = a >>> 16;
	const aLow = a & 0xffff;
	const bHigh = b >>> 16;
	const bLow = b & 0xffff;
	const low = aLow * bLow;
	const middle = aHigh * bLow + (low >>> 16);
	const middleLow = (middle & 0xffff) + aLow * bHigh;
	return (aHigh * bHigh + Math.floor(middle / 65536) + Math.floor(middleLow / 65536)) >>> 0;
}

/** Four 32-bit words of (seed, stream, step, index). seed: 0 .. 2^64 - 1; index: 0 .. 2^53. */
export function philox(seed: bigint, stream: number, step: number, index: number): [number, number, number, number] {
	let c0 = index >>> 0;
	let c1 = Math.floor(index / 4294967296) >>> 0;
	let c2 = step >>> 0;
	let c3 = stream >>> 0;
	let k0 = Number(seed & 0xffffffffn);
	let k1 = Number((seed >> 32n) & 0xffffffffn);
	for (let round = 0; round < 10; round++) {
		const high0 = mulHigh(0xd2511f53, c0);
		const low0 = Math.imul(0xd2511f53, c0) >>> 0;
		const high1 = mulHigh(0xcd9e8d57, c2);
		const low1 = Math.imul(0xcd9e8d57, c2) >>> 0;
		c0 = (high1 ^ c1 ^ k0) >>> 0;
		c1 = low1;
		c2 = (high0 ^ c3 ^ k1) >>> 0;
		c3 = low0;
		k0 = (k0 + 0x9e3779b9) >>> 0;
		k1 = (k1 + 0xbb67ae85) >>> 0;
	}
	return [c0, c1, c2, c3];
}

/** Uniform in [0, 1) with 53 bits. */
export function uniform(seed: bigint, stream: number, step: number, index: number): number {
	const [high, low] = philox(seed, stream, step, index);
	return ((high >>> 5) * 67108864 + (low >>> 6)) / 9007199254740992;
}

/** A random permutation of 0 .. n-1 (Fisher-Yates), a function of (seed, stream, step). */
export function permutation(n: number, seed: bigint, stream: number, step: number): Uint32Array {
	const order = inOrder(n);
	for (let i = n - 1; i > 0; i--) exchange(order, i, seed, stream, step);
	return order;
}

/** The same permutation; the event loop turns meanwhile. @throws `signal.reason` */
export async function permutationInTurns(
	n: number,
	seed: bigint,
	stream: number,
	step: number,
	signal: AbortSignal | undefined,
): Promise<Uint32Array> {
	const turns = new Turns();
	const order = inOrder(n);
	for (let i = n - 1; i > 0; i--) {
		exchange(order, i, seed, stream, step);
		if (i % 4096 !== 0) continue;
		await turns.next();
		signal?.throwIfAborted();
	}
	return order;
}

function inOrder(n: number): Uint32Array {
	const order = new Uint32Array(n);
	for (let i = 0; i < n; i++) order[i] = i;
	return order;
}

function exchange(order: Uint32Array, i: number, seed: bigint, stream: number, step: number): void {
	const j = Math.floor(uniform(seed, stream, step, i) * (i + 1));
	const held = order[i] as number;
	order[i] = order[j] as number;
	order[j] = held;
}
