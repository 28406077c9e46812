/** Scatter plots as SVG text: axes, ticks, one series per method. No dependencies, no styles from outside. */

export interface Series {
	readonly name: string;
	readonly points: readonly { readonly x: number; readonly y: number; readonly label?: string }[];
	/** Joins the points by a line. */
	readonly line?: boolean;
}

export interface Chart {
	readonly title: string;
	readonly x: string;
	readonly y: string;
	readonly series: readonly Series[];
}

const colours = [
	'#1f77b4',
	'#d62728',
	'#2ca02c',
	'#9467bd',
	'#ff7f0e',
	'#17becf',
	'#8c564b',
	'#e377c2',
	'#7f7f7f',
	'#bcbd22',
	'#000000',
];
const width = 760;
const height = 440;
const left = 70;
const right = 190;
const top = 40;
const bottom = 60;

/** One chart, 760 x 440. */
export function svgChart({ title, x, y, series }: Chart): string {
	const all = series.flatMap(({ points }) => points);
	const xs = ticks(all.map((point) => point.x));
	const ys = ticks(all.map((point) => point.y));
	const place = (value: number, scale: readonly number[], from: number, to: number): number => {
		const low = scale[0] as number;
		const high = scale[scale.length - 1] as number;
		return from + ((value - low) / (high - low)) * (to - from);
	};
	const px = (value: number): number => place(value, xs, left, width - right);
	const py = (value: number): number => place(value, ys, height - bottom, top);
	const out: string[] = [
		`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}" font-family="sans-serif" font-size="12" role="img" aria-label="${escapeXml(title)}">`,
		`<rect width="${width}" height="${height}" fill="#ffffff"/>`,
		`<text x="${left}" y="22" font-size="15" font-weight="bold">${escapeXml(title)}</text>`,
	];
	for (const value of xs) {
		const at = px(value).toFixed(1);
		out.push(`<line x1="${at}" y1="${top}" x2="${at}" y2="${height - bottom}" stroke="#e0e0e0"/>`);
		out.push(`<text x="${at}" y="${height - bottom + 18}" text-anchor="middle">${tick(value)}</text>`);
	}
	for (const value of ys) {
		const at = py(value).toFixed(1);
		out.push(`<line x1="${left}" y1="${at}" x2="${width - right}" y2="${at}" stroke="#e0e0e0"/>`);
		out.push(`<text x="${left - 8}" y="${at}" text-anchor="end" dominant-baseline="middle">${tick(value)}</text>`);
	}
	out.push(`<text x="${(left + width - right) / 2}" y="${height - 16}" text-anchor="middle">${escapeXml(x)}</text>`);
	const middle = (top + height - bottom) / 2;
	out.push(
		`<text x="18" y="${middle}" text-anchor="middle" transform="rotate(-90 18 ${middle})">${escapeXml(y)}</text>`,
	);
	for (const [i, { name, points, line }] of series.entries()) {
		const colour = colours[i % colours.length] as string;
		if (line && points.length > 1) {
			const path = points.map((point) => `${px(point.x).toFixed(1)},${py(point.y).toFixed(1)}`).join(' ');
			out.push(`<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="1.5"/>`);
		}
		for (const point of points) {
			const said = `${name}${point.label ? ` (${point.label})` : ''}: ${tick(point.x)}, ${tick(point.y)}`;
			out.push(
				`<circle cx="${px(point.x).toFixed(1)}" cy="${py(point.y).toFixed(1)}" r="4" fill="${colour}"><title>${escapeXml(said)}</title></circle>`,
			);
		}
		const row = top + 10 + i * 18;
		out.push(`<circle cx="${width - right + 20}" cy="${row}" r="4" fill="${colour}"/>`);
		out.push(`<text x="${width - right + 30}" y="${row}" dominant-baseline="middle">${escapeXml(name)}</text>`);
	}
	out.push('</svg>');
	return `${out.join('\n')}\n`;
}

/** Round values that span the given ones: 1, 2 or 5 times a power of ten apart. */
export function ticks(values: readonly number[]): number[] {
	const finite = values.filter(Number.isFinite);
	const low = finite.length > 0 ? Math.min(...finite) : 0;
	const high = finite.length > 0 ? Math.max(...finite) : 1;
	const span = high - low || Math.max(Math.abs(high), 1) * 0.1;
	const rough = span / 5;
	const power = 10 ** Math.floor(Math.log10(rough));
	const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough * (1 - 1e-9)) as number);
	const from = Math.floor(low / step + 1e-9);
	const to = Math.max(from + 1, Math.ceil(high / step - 1e-9));
	return Array.from({ length: to - from + 1 }, (_, i) => (from + i) * step);
}

function tick(value: number): string {
	return String(Number(value.toPrecision(6)));
}

export function escapeXml(text: string): string {
	return text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
}
