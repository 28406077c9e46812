/**
 * A program, run by lib/data/bpe.ts in a process of its own: learns the merges of a text file and saves a tokenizer.json.
 * The trainer of the `tokenizers` package draws bars and prints lines straight to the terminal and takes no option against
 * it; here its output goes nowhere.
 *
 *     node bpe-learn.js CORPUS_TXT OUT_JSON
 */
import { createRequire } from 'node:module';

const require = createRequire(import.meta.url);
const { BPE, Tokenizer, byteLevelPreTokenizer } = require('tokenizers') as typeof import('tokenizers');

const [corpus, out] = process.argv.slice(2) as [string, string];
const trained = new Tokenizer(BPE.empty());
trained.setPreTokenizer(byteLevelPreTokenizer(false, true));
trained.train([corpus]);
trained.save(out);
