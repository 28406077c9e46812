/**
 * Byte-level byte-pair encoding: one word in, token ids out. The part of a tokenizer that the `tokenizers` package offers only
 * asynchronously. Adjacent tokens merge in the order of the merge list, the leftmost of equals first.
 */
import { DiffusionNativeError } from './errors.js';

/** Character that stands for each byte in a byte-level vocabulary: printable ones as they are, the rest from U+0100 on. */
export const byteToChar: readonly string[] = (() => {
	const chars: string[] = [];
	let next = 0x100;
	for (let byte = 0; byte < 256; byte++) {
		const printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
		chars.push(String.fromCharCode(printable ? byte : next++));
	}
	return chars;
})();

const charToByte: ReadonlyMap<string, number> = new Map(byteToChar.map((char, byte) => [char, byte]));

const utf8 = new TextEncoder();

/** The byte-level spelling of a text: one character per UTF-8 byte. */
export function toByteChars(text: string): string {
	let out = '';
	for (const byte of utf8.encode(text)) out += byteToChar[byte];
	return out;
}

/** The bytes a vocabulary entry stands for; undefined when it is not written in byte-level characters. */
export function fromByteChars(token: string): Uint8Array | undefined {
	const bytes = new Uint8Array(token.length);
	for (let i = 0; i < token.length; i++) {
		const byte = charToByte.get(token[i] as string);
		if (byte === undefined) return undefined;
		bytes[i] = byte;
	}
	return bytes;
}

/** Words longer than this are merged with a heap; up to it, scanning for the best pair is faster. */
const scanLimit = 48;
/** Words remembered with their ids. Texts repeat few distinct words. */
const cacheWords = 1 << 16;
const cacheWordLength = 48;

/** A vocabulary with its merge list. Immutable but for its cache. */
export class ByteBpe {
	/** Id of the token of each single byte, -1 when the vocabulary lacks it. */
	private readonly byteIds = new Int32Array(256).fill(-1);
	/** left * span + right -> index into the merge list. */
	private readonly ranks = new Map<number, number>();
	/** Id that each merge makes. */
	private readonly merged: Int32Array;
	private readonly span: number;
	private readonly cache = new Map<string, readonly number[]>();

	/**
	 * @param ignoreMerges A word that is a token as a whole is that token, whatever the merges say.
	 * @throws `ERR_DN_CHECKPOINT` when a merge names a token that the vocabulary lacks.
	 */
	constructor(
		private readonly vocab: ReadonlyMap<string, number>,
		merges: readonly (readonly [string, string])[],
		private readonly ignoreMerges: boolean,
		source: string,
	) {
		let top = 0;
		for (const id of vocab.values()) top = Math.max(top, id);
		this.span = top + 1;
		byteToChar.forEach((char, byte) => {
			this.byteIds[byte] = vocab.get(char) ?? -1;
		});
		this.merged = new Int32Array(merges.length);
		merges.forEach(([left, right], rank) => {
			const ids = [vocab.get(left), vocab.get(right), vocab.get(left + right)];
			const [a, b, made] = ids;
			if (a === undefined || b === undefined || made === undefined) {
				const missing = [left, right, left + right][ids.indexOf(undefined)];
				throw new DiffusionNativeError(
					'ERR_DN_CHECKPOINT',
					`${source}: merge ${rank} (${JSON.stringify(left)} ${JSON.stringify(right)}) needs the token ${JSON.stringify(missing)}, which is not in the vocabulary`,
				);
			}
			const pair = a * this.span + b;
			if (!this.ranks.has(pair)) this.ranks.set(pair, rank);
			this.merged[rank] = made;
		});
	}

	/** Appends the ids of one word, given as text. */
	encodeText(word: string, out: number[]): void {
		const known = this.cache.get(word);
		if (known) {
			for (let i = 0; i < known.length; i++) out.push(known[i] as number);
			return;
		}
		this.remember(word, this.merge(utf8.encode(word), this.ignoreMerges ? toByteChars(word) : ''), out);
	}

	/** Appends the ids of one word, given in byte-level characters. */
	encodeByteChars(word: string, out: number[]): void {
		const bytes = fromByteChars(word);
		if (!bytes) {
			throw new DiffusionNativeError(
				'ERR_DN_INTERNAL',
				`the pre-tokenizer made ${JSON.stringify(word)}, which is not byte-level`,
			);
		}
		for (const id of this.merge(bytes, word)) out.push(id);
	}

	private remember(word: string, ids: readonly number[], out: number[]): void {
		for (const id of ids) out.push(id);
		if (word.length > cacheWordLength) return;
		if (this.cache.size >= cacheWords) this.cache.clear();
		// A word is cut from its text, and V8 keeps the whole text alive for it: the key is a copy.
		this.cache.set(Buffer.from(word).toString(), ids);
	}

	private merge(bytes: Uint8Array, spelling: string): number[] {
		if (this.ignoreMerges) {
			const whole = this.vocab.get(spelling);
			if (whole !== undefined) return [whole];
		}
		const ids: number[] = new Array(bytes.length);
		for (let i = 0; i < bytes.length; i++) {
			const byte = bytes[i] as number;
			const id = this.byteIds[byte] as number;
			if (id < 0) {
				throw new DiffusionNativeError(
					'ERR_DN_ARGUMENT',
					`the vocabulary has no token for the byte 0x${byte.toString(16).padStart(2, '0')} of ${JSON.stringify(new TextDecoder().decode(bytes).slice(0, 40))}`,
				);
			}
			ids[i] = id;
		}
		return ids.length <= scanLimit ? this.mergeScanning(ids) : this.mergeWithHeap(ids);
	}

	private rankOf(left: number, right: number): number {
		return this.ranks.get(left * this.span + right) ?? -1;
	}

	private mergeScanning(ids: number[]): number[] {
		for (;;) {
			let best = -1;
			let at = -1;
			for (let i = 0; i + 1 < ids.length; i++) {
				const rank = this.rankOf(ids[i] as number, ids[i + 1] as number);
				if (rank >= 0 && (best < 0 || rank < best)) {
					best = rank;
					at = i;
				}
			}
			if (best < 0) return ids;
			ids[at] = this.merged[best] as number;
			ids.splice(at + 1, 1);
		}
	}

	/** O(n log n): symbols are a linked list, candidate pairs a heap ordered by (rank, position); stale ones are skipped. */
	private mergeWithHeap(ids: number[]): number[] {
		const count = ids.length;
		const next = new Int32Array(count);
		const previous = new Int32Array(count);
		for (let i = 0; i < count; i++) {
			next[i] = i + 1 < count ? i + 1 : -1;
			previous[i] = i - 1;
		}
		// One number per candidate keeps the heap flat: rank * count + position. Both factors stay below 2^26.
		const heap = new MinHeap();
		const consider = (left: number): void => {
			const right = left < 0 ? -1 : (next[left] as number);
			if (right < 0) return;
			const rank = this.rankOf(ids[left] as number, ids[right] as number);
			if (rank >= 0) heap.push(rank * count + left);
		};
		for (let i = 0; i + 1 < count; i++) consider(i);
		for (let top = heap.pop(); top >= 0; top = heap.pop()) {
			const left = top % count;
			const rank = (top - left) / count;
			const right = next[left] as number;
			if (ids[left] === -1 || right < 0) continue;
			if (this.rankOf(ids[left] as number, ids[right] as number) !== rank) continue;
			ids[left] = this.merged[rank] as number;
			ids[right] = -1;
			const after = next[right] as number;
			next[left] = after;
			if (after >= 0) previous[after] = left;
			consider(previous[left] as number);
			consider(left);
		}
		return ids.filter((id) => id !== -1);
	}
}

/** A binary heap of non-negative numbers. */
class MinHeap {
	private readonly items: number[] = [];

	push(value: number): void {
		const { items } = this;
		let child = items.push(value) - 1;
		while (child > 0) {
			const parent = (child - 1) >> 1;
			if ((items[parent] as number) <= value) break;
			items[child] = items[parent] as number;
			child = parent;
		}
		items[child] = value;
	}

	/** The smallest value, removed; -1 when empty. */
	pop(): number {
		const { items } = this;
		const last = items.pop();
		if (last === undefined) return -1;
		const top = items[0];
		if (top === undefined) return last;
		let hole = 0;
		for (;;) {
			let child = 2 * hole + 1;
			if (child >= items.length) break;
			if (child + 1 < items.length && (items[child + 1] as number) < (items[child] as number)) child++;
			if ((items[child] as number) >= last) break;
			items[hole] = items[child] as number;
			hole = child;
		}
		items[hole] = last;
		return top;
	}
}
