/**
 * Finds added tokens (`<|endoftext|>` and the like) in a text, with the matching rules of Hugging Face's tokenizers: leftmost,
 * then longest; the flags `single_word`, `lstrip`, `rstrip` and `normalized`.
 */

/** An entry of `added_tokens` in a `tokenizer.json`. */
export interface AddedToken {
	id: number;
	content: string;
	special: boolean;
	/** Only where no letter, digit or underscore touches it. */
	single_word?: boolean;
	/** Swallows the white space before it. */
	lstrip?: boolean;
	/** Swallows the white space after it. */
	rstrip?: boolean;
	/** Looked for after the normaliser has run. */
	normalized?: boolean;
}

const wordAt = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}]/u;
const spaceBefore = /\p{White_Space}+$/u;
const spaceAfter = /^\p{White_Space}+/u;

export class AddedTokenMatcher {
	private readonly byContent: ReadonlyMap<string, AddedToken>;
	private readonly raw: RegExp | undefined;
	private readonly normalized: RegExp | undefined;

	constructor(tokens: readonly AddedToken[]) {
		this.byContent = new Map(tokens.map((token) => [token.content, token]));
		this.raw = alternation(tokens.filter((token) => !token.normalized));
		this.normalized = alternation(tokens.filter((token) => token.normalized));
	}

	/** The parts of `text` in order: an id for each token found, the text between. `normalized` picks the pass. */
	split(text: string, normalized: boolean): (string | number)[] {
		const pattern = normalized ? this.normalized : this.raw;
		if (!pattern) return text === '' ? [] : [text];
		const parts: (string | number)[] = [];
		let from = 0;
		for (const match of text.matchAll(pattern)) {
			const token = this.byContent.get(match[0]);
			let begin = match.index;
			let end = begin + match[0].length;
			if (!token || begin < from) continue;
			if (token.single_word && (touchesWord(text, begin, -1) || touchesWord(text, end, 1))) continue;
			if (token.lstrip) begin -= spaceBefore.exec(text.slice(from, begin))?.[0].length ?? 0;
			if (token.rstrip) end += spaceAfter.exec(text.slice(end))?.[0].length ?? 0;
			if (begin > from) parts.push(text.slice(from, begin));
			parts.push(token.id);
			from = end;
		}
		if (from < text.length) parts.push(text.slice(from));
		return parts;
	}
}

function alternation(tokens: readonly AddedToken[]): RegExp | undefined {
	const contents = tokens.map((token) => token.content).filter((content) => content !== '');
	if (contents.length === 0) return undefined;
	contents.sort((a, b) => b.length - a.length);
	return new RegExp(contents.map((content) => content.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&')).join('|'), 'gu');
}

function touchesWord(text: string, at: number, direction: 1 | -1): boolean {
	const char = direction === 1 ? [...text.slice(at, at + 2)][0] : [...text.slice(Math.max(0, at - 2), at)].at(-1);
	return char !== undefined && wordAt.test(char);
}
