/**
 * What every request to the hub shares: the endpoint, the token, the abort signal, bounded retries, and one way to turn
 * failures into `ERR_DN_HUB`.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { HubApiError, InvalidApiResponseFormatError } from '@huggingface/hub';

import { DiffusionNativeError } from './errors.js';
import { reasonOf } from './files.js';
import type { HubRequest } from './hub-cache.js';

/** Attempts in a row without progress before a download or a question is given up. */
export const maxAttempts = 5;

/** Parameters that every call of `@huggingface/hub` gets. */
export interface HubCallParameters {
	hubUrl: string;
	fetch: typeof fetch;
	accessToken?: string;
}

/** A request for a part of a file was answered with the whole file. */
export class NoRanges extends Error {
	constructor() {
		super('a part of a file was asked for and the whole file sent; a server of models has to heed Range');
	}
}

export class HubConnection {
	/** X-Error-Code of the last refusal: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo. */
	private refusal: string | undefined;
	/** How the last request failed: what `fetch` threw, or the answer that was a refusal. */
	private failure: { error: unknown } | { status: number; url: string } | undefined;

	constructor(private readonly request: HubRequest) {}

	get parameters(): HubCallParameters {
		const { endpoint, token } = this.request;
		return { hubUrl: endpoint, fetch: this.fetch, ...(token === undefined ? {} : { accessToken: token }) };
	}

	/** fetch with the abort signal; remembers failures. */
	private readonly fetch = async (input: string | URL | Request, init?: RequestInit): Promise<Response> => {
		const { signal } = this.request;
		this.failure = undefined;
		try {
			const response = await globalThis.fetch(input, signal ? { ...init, signal } : init);
			if (!response.ok) {
				this.refusal = response.headers.get('x-error-code') ?? undefined;
				this.failure = { status: response.status, url: response.url };
			}
			if (response.status === 200 && new Headers(init?.headers).has('range') && !isXetAnswer(response)) {
				await response.body?.cancel();
				throw new NoRanges();
			}
			return response;
		} catch (error) {
			this.failure = { error };
			throw error;
		}
	};

	/** The error behind one from a stream of `@huggingface/hub`, which has only the message of a failed request. */
	restore(error: unknown): unknown {
		if (typeof error !== 'string' || !this.failure) return error;
		if ('error' in this.failure) return this.failure.error;
		return new HubApiError(this.failure.url, this.failure.status, undefined, error);
	}

	/** Runs one question to the hub, again when the connection failed or the server is overloaded. */
	async call<T>(what: string, ask: (parameters: HubCallParameters) => Promise<T>): Promise<T> {
		for (let attempt = 1; ; attempt++) {
			this.request.signal?.throwIfAborted();
			try {
				return await ask(this.parameters);
			} catch (error) {
				this.request.signal?.throwIfAborted();
				if (attempt >= maxAttempts || !isTransient(error)) throw this.explain(what, error);
				await this.pause(attempt);
			}
		}
	}

	/** Waits 0.2, 0.4, 0.8, ... seconds. */
	async pause(attempt: number): Promise<void> {
		const { signal } = this.request;
		try {
			await sleep(Math.min(5000, 100 * 2 ** attempt), undefined, signal ? { signal } : {});
		} catch {
			signal?.throwIfAborted();
		}
	}

	/** The error a user sees. */
	explain(what: string, error: unknown): DiffusionNativeError {
		if (error instanceof DiffusionNativeError) return error;
		const { endpoint, token } = this.request;
		const fail = (message: string): DiffusionNativeError =>
			new DiffusionNativeError('ERR_DN_HUB', message, { cause: error });
		if (!(error instanceof HubApiError)) {
			const { cause } = error as { cause?: unknown };
			const reason = `${reasonOf(error)}${cause ? ` (${reasonOf(cause)})` : ''}`;
			if (!isTransient(error)) return fail(`${what}: ${endpoint} does not answer as a hub does: ${reason}`);
			return fail(`${what}: ${endpoint} could not be reached: ${reason}${proxyAdvice()}`);
		}
		const status = error.statusCode;
		const advice =
			token === undefined ? 'set HF_TOKEN to a token that may read it' : 'the token in HF_TOKEN may not read it';
		if (status === 401 || status === 403) {
			return fail(`${what}: ${endpoint} refused with ${status}: it does not exist, or needs a token; ${advice}`);
		}
		if (status === 404) {
			const missing = {
				RepoNotFound: 'no such model',
				RevisionNotFound: 'no such revision',
				EntryNotFound: 'no such file',
			};
			const known = missing[this.refusal as keyof typeof missing] ?? 'not found (404)';
			return fail(`${what}: ${known} at ${endpoint}`);
		}
		return fail(`${what}: ${endpoint} answered with status ${status}: ${error.message}`);
	}
}

/** Worth another try: the connection failed, or the server says "later". */
export function isTransient(error: unknown): boolean {
	if (error instanceof DiffusionNativeError) return false;
	if (error instanceof HubApiError) return error.statusCode === 429 || error.statusCode >= 500;
	return !(error instanceof NoRanges || error instanceof InvalidApiResponseFormatError);
}

/** True for an error of {@link HubConnection.explain} about a connection that failed or a server that says "later". */
export function isUnreachable(error: unknown): boolean {
	if (!(error instanceof DiffusionNativeError) || error.code !== 'ERR_DN_HUB') return false;
	return error.cause !== undefined && isTransient(error.cause);
}

/** The hub's answer to a question for the size of a file in Xet storage: the size is in the headers, the body is no file. */
function isXetAnswer(response: Response): boolean {
	return response.headers.get('content-type')?.includes('application/vnd.xet-fileinfo+json') ?? false;
}

/** What to try where the environment names a proxy, which Node.js heeds only when told to. */
function proxyAdvice(): string {
	const names = ['HTTPS_PROXY', 'https_proxy', 'HTTP_PROXY', 'http_proxy', 'ALL_PROXY', 'all_proxy'];
	const name = names.find((each) => process.env[each]);
	if (name === undefined) return '';
	return `; ${name} is set: Node.js goes through HTTPS_PROXY and HTTP_PROXY only with NODE_USE_ENV_PROXY=1, from Node.js 22.21 and 24 on`;
}
