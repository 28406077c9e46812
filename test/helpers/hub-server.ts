/**
 * A small hub on loopback: the routes of Hugging Face that downloading a model uses (model info, paged file list, resolve with
 * ranges, ETags and a redirect to a "CDN" for large files), with faults that tests switch on.
 */
import { createHash } from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';

export interface HubRepository {
	commit: string;
	files: Record<string, Uint8Array>;
}

export interface HubFaults {
	/** Cut the connection after this many bytes of a file's body; how often. */
	drop?: { file: string; after: number; times: number };
	/** The list and headers promise this size. */
	size?: { file: string; size: number };
	/** Send these bytes while the ETag stays. */
	body?: { file: string; bytes: Uint8Array };
	/** Answer every request with this status. */
	status?: number;
	/** Answer this many requests with 503 first. */
	busy?: number;
	/** Extra names in the file list. */
	listed?: string[];
	/** Ignore Range on whole-file requests other than the one for the size. */
	ignoreRange?: boolean;
	/** Answer every request for a part of this file, the one for its size too, with the whole. */
	wholeOnly?: string;
	/** Refuse the body of a file with this status; how often. */
	refuseBody?: { file: string; status: number; times: number };
	/** Redirect to addresses that are good for one body each; later requests get 403. */
	expire?: boolean;
	/** Offer large files by Xet to those who accept it; whatever they then ask for under /xet/ is not there. */
	xet?: boolean;
	/** Wait before each piece of a body, ms. */
	slowMs?: number;
	/** Token that requests must carry. */
	token?: string;
}

/** Files from this size on are in large-file storage: SHA-256 as ETag, served from another path by redirect. */
const largeFrom = 4096;
const pageSize = 3;

export class HubServer {
	readonly repositories = new Map<string, HubRepository>();
	/** Extra revisions: "id@branch" -> commit. */
	readonly branches = new Map<string, string>();
	/** Every request, "GET /path range". */
	readonly requests: string[] = [];
	/** Paths of bodies that the client did not wait for. */
	readonly left: string[] = [];
	private readonly spent = new Set<string>();
	private signatures = 0;
	faults: HubFaults = {};
	private server: Server;

	private constructor() {
		this.server = createServer((request, response) => {
			this.handle(request, response).catch(() => response.destroy());
		});
	}

	static async start(): Promise<HubServer> {
		const hub = new HubServer();
		await new Promise<void>((resolve) => hub.server.listen(0, '127.0.0.1', resolve));
		return hub;
	}

	get url(): string {
		return `http://127.0.0.1:${(this.server.address() as AddressInfo).port}`;
	}

	/** Requests for the body of a file, not counting the one byte that asks for the size. */
	bodyRequests(file: string): string[] {
		return this.requests.filter((line) => line.includes(file) && line.includes('/cdn/') && !line.includes('bytes=0-0'));
	}

	async stop(): Promise<void> {
		this.server.closeAllConnections();
		await new Promise((resolve) => this.server.close(resolve));
	}

	private async handle(request: IncomingMessage, response: ServerResponse): Promise<void> {
		const url = new URL(request.url ?? '/', this.url);
		const path = decodeURIComponent(url.pathname);
		this.requests.push(`${request.method} ${path} ${request.headers.range ?? ''}`.trim());
		const { faults } = this;
		const refuse = (status: number, code?: string): void => {
			response.writeHead(status, { 'content-type': 'application/json', ...(code ? { 'x-error-code': code } : {}) });
			response.end(JSON.stringify({ error: code ?? `status ${status}` }));
		};
		if (faults.status !== undefined) return refuse(faults.status);
		if ((faults.busy ?? 0) > 0) {
			faults.busy = (faults.busy as number) - 1;
			return refuse(503);
		}
		if (faults.token !== undefined && request.headers.authorization !== `Bearer ${faults.token}`)
			return refuse(401, 'GatedRepo');

		const info = /^\/api\/models\/(.+)\/revision\/(.+)$/.exec(path);
		if (info) {
			const [, id, revision] = info as unknown as [string, string, string];
			const repository = this.repositories.get(id);
			if (!repository) return refuse(404, 'RepoNotFound');
			const commit = this.commitOf(id, revision);
			if (!commit) return refuse(404, 'RevisionNotFound');
			response.writeHead(200, { 'content-type': 'application/json' });
			response.end(
				JSON.stringify({ _id: 'x', id, sha: commit, private: false, likes: 0, downloads: 0, lastModified: 0 }),
			);
			return;
		}
		const tree = /^\/api\/models\/(.+)\/tree\/([^/]+)$/.exec(path);
		if (tree) return this.list(tree[1] as string, url, response);
		const file = /^\/(?:cdn\/)?(.+)\/resolve\/([^/]+)\/(.+)$/.exec(path);
		if (file) return this.send(file[1] as string, file[3] as string, path, request, response);
		refuse(404);
	}

	private commitOf(id: string, revision: string): string | undefined {
		const commit = this.repositories.get(id)?.commit;
		return revision === 'main' || revision === 'HEAD' || revision === commit
			? commit
			: this.branches.get(`${id}@${revision}`);
	}

	private refusal(name: string, request: IncomingMessage, isProbe: boolean): number | undefined {
		if (isProbe) return undefined;
		const { refuseBody, expire } = this.faults;
		if (refuseBody?.file === name && refuseBody.times > 0) {
			refuseBody.times--;
			return refuseBody.status;
		}
		const address = request.url ?? '';
		if (!expire || !address.includes('signature=')) return undefined;
		if (this.spent.has(address)) return 403;
		this.spent.add(address);
		return undefined;
	}

	private sizeOf(name: string, bytes: Uint8Array): number {
		return this.faults.size?.file === name ? this.faults.size.size : bytes.length;
	}

	private list(id: string, url: URL, response: ServerResponse): void {
		const files = this.repositories.get(id)?.files ?? {};
		const entries: object[] = Object.entries(files).map(([path, bytes]) => {
			const size = this.sizeOf(path, bytes);
			const lfs = bytes.length >= largeFrom ? { lfs: { oid: sha256(bytes), size, pointerSize: 130 } } : {};
			return { type: 'file', path, size, oid: gitHash(bytes), ...lfs };
		});
		entries.push({ type: 'directory', path: 'onnx', size: 0, oid: '0'.repeat(40) });
		for (const path of this.faults.listed ?? []) entries.push({ type: 'file', path, size: 1, oid: '0'.repeat(40) });
		const from = Number(url.searchParams.get('cursor') ?? 0);
		const next = from + pageSize;
		url.searchParams.set('cursor', String(next));
		response.writeHead(200, {
			'content-type': 'application/json',
			...(next < entries.length ? { link: `<${url.href}>; rel="next"` } : {}),
		});
		response.end(JSON.stringify(entries.slice(from, next)));
	}

	private async send(
		id: string,
		name: string,
		path: string,
		request: IncomingMessage,
		response: ServerResponse,
	): Promise<void> {
		const bytes = this.repositories.get(id)?.files[name];
		if (!bytes) {
			response.writeHead(404, { 'x-error-code': 'EntryNotFound' }).end();
			return;
		}
		const isLarge = bytes.length >= largeFrom;
		const { faults } = this;
		if (isLarge && !path.startsWith('/cdn/')) {
			const linked = { 'x-linked-etag': `"${sha256(bytes)}"`, 'x-linked-size': bytes.length };
			if (faults.xet && request.headers.accept?.includes('application/vnd.xet-fileinfo+json')) {
				const links = ['xet-auth', 'xet-reconstruction-info'].map((rel) => `<${this.url}/xet/${rel}>; rel="${rel}"`);
				const type = 'application/vnd.xet-fileinfo+json';
				response.writeHead(200, {
					...linked,
					'content-type': type,
					'x-xet-hash': sha256(bytes),
					link: links.join(', '),
				});
				response.end('{}');
				return;
			}
			const signature = faults.expire ? `?signature=${++this.signatures}` : '';
			response.writeHead(302, { ...linked, location: `/cdn${path}${signature}` }).end();
			return;
		}
		const body = faults.body?.file === name ? faults.body.bytes : bytes;
		const size = this.sizeOf(name, body);
		const range = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '');
		const isProbe = range?.[2] === '0';
		const partial = range && (isProbe || !faults.ignoreRange) && faults.wholeOnly !== name;
		const refused = this.refusal(name, request, isProbe);
		if (refused !== undefined) {
			response.writeHead(refused, { 'content-type': 'application/json' }).end('{"error": "denied"}');
			return;
		}
		const begin = partial ? Number(range[1]) : 0;
		const end = partial ? Math.min(Number(range[2]) + 1, body.length) : body.length;
		response.writeHead(partial ? 206 : 200, {
			etag: `"${isLarge ? sha256(bytes) : gitHash(bytes)}"`,
			'accept-ranges': 'bytes',
			'content-length': end - begin,
			...(partial ? { 'content-range': `bytes ${begin}-${end - 1}/${size}` } : {}),
		});
		response.on('close', () => {
			if (!response.writableFinished) this.left.push(path);
		});
		let sent = 0;
		const piece = 16384;
		for (let at = begin; at < end; at += piece) {
			if (faults.slowMs) await new Promise((resolve) => setTimeout(resolve, faults.slowMs));
			const chunk = body.subarray(at, Math.min(at + piece, end));
			const { drop } = faults;
			if (drop?.file === name && !isProbe && drop.times > 0 && sent + chunk.length > drop.after) {
				drop.times--;
				response.write(chunk.subarray(0, drop.after - sent), () => response.destroy());
				return;
			}
			if (response.destroyed) return;
			response.write(chunk);
			sent += chunk.length;
		}
		response.end();
	}
}

export function sha256(bytes: Uint8Array): string {
	return createHash('sha256').update(bytes).digest('hex');
}

/** The id git gives a file. */
export function gitHash(bytes: Uint8Array): string {
	return createHash('sha1').update(`blob ${bytes.length}\0`).update(bytes).digest('hex');
}
