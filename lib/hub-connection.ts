/**
 * What every request to the hub shares: the endpoint, the token, the abort signal, bounded retries, and one way to turn
 * failures into `ERR_DN_HUB`.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { HubApiError } from '@huggingface/hub';

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

export class HubConnection {
	/** X-Error-Code of the last refusal: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo. */
	private refusal: string | undefined;
	/** Set when a request for the rest of a file was answered with the whole file. */
	ignoredRange = false;

	constructor(private readonly request: HubRequest) {}

	get parameters(): HubCallParameters {
		const { endpoint, token } = this.request;
		return { hubUrl: endpoint, fetch: this.fetch, ...(token === undefined ? {} : { accessToken: token }) };
	}

	/** fetch with the abort signal; remembers refusals. */
	private readonly fetch = async (input: string | URL | Request, init?: RequestInit): Promise<Response> => {
		const { signal } = this.request;
		const response = await globalThis.fetch(input, signal ? { ...init, signal } : init);
		if (!response.ok) this.refusal = response.headers.get('x-error-code') ?? undefined;
		const range = new Headers(init?.headers).get('range');
		if (response.status === 200 && range !== null && !range.startsWith('bytes=0-')) {
			this.ignoredRange = true;
			await response.body?.cancel();
			throw new Error('the server does not send parts of files');
		}
		return response;
	};

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
			return fail(
				`${what}: ${endpoint} could not be reached: ${reasonOf(error)}${cause ? ` (${reasonOf(cause)})` : ''}`,
			);
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
	return true;
}
