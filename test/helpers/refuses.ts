/** Asserts refusals: a `DiffusionNativeError` with a code and a message that names the thing. */
import type { ExecutionContext } from 'ava';
import { DiffusionNativeError, type ErrorCode } from 'diffusion-native';

/** Fails unless `call` throws or rejects with this code and message. `label` says which case it was. */
export async function refuses(
	t: ExecutionContext,
	call: () => unknown,
	code: ErrorCode,
	message: RegExp,
	label: string,
): Promise<void> {
	try {
		await call();
		t.fail(`${label}: accepted`);
	} catch (error) {
		if (!(error instanceof DiffusionNativeError)) {
			t.fail(`${label}: ${error}`);
			return;
		}
		t.is(error.code, code, `${label}: ${error.message}`);
		t.regex(error.message, message, label);
	}
}
