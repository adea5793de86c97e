"""What a refusal means, in words for people: one entry for each code that a check of something signed can end with.

An error's own text says what was expected and found. This says what it means and what usually lies behind it. The
program prints it below the error, and `docs/errors.md` is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping

EXPLANATIONS: Mapping[str, str] = {
    # --- signatures ---
    "SIGNATURE_MISSING": "Nobody signed this folder. Unsigned folders are never used.",
    "SIGNATURE_SHAPE": "The signature file is damaged, or of another kind than the one that is accepted. Other kinds "
    "are refused even if they may be genuine, so that nobody can choose a weaker one.",
    "SIGNATURE_KEY": "The signature was made with another key than the one that its owner is known by.",
    "SIGNATURE_INVALID": "What lies here is not what the owner of the key signed: it was altered on the way, or "
    "somebody else signed in the owner's name. Ask the sender for it again, by another way.",
    "SIGNATURE_STATEMENT": "The signature is genuine, but what it says is no list of files that is accepted.",
    "ENVELOPE_SHAPE": "The signed document is damaged, or not in the one form that is accepted.",
    "ENVELOPE_TYPE": "This is a signed document of another kind. A signature for one purpose is none for another.",
    "ENVELOPE_KEY": "Whoever signed this document is not among those who may.",
    "ENVELOPE_INVALID": "The document is not what the owner of the key signed: it was altered on the way, or somebody "
    "else signed in the owner's name.",
    # --- files ---
    "FILE_CHANGED": "A file is not the one that was signed. It was damaged or exchanged after signing.",
    "FILE_MISSING": "A file that belongs here is not there. It was lost or taken away.",
    "FILE_UNSIGNED": "A file lies here that the signer did not sign. Somebody added it afterwards.",
    "FILE_UNEXPECTED": "A file lies here that has no place in such a folder. Only a closed list of names is accepted, "
    "signed or not, because other programs may act on others.",
    "FILE_NOT_REGULAR": "A link, a device or the like stands where a file should be. It could lead anywhere.",
    "FILE_LINKED": "A file here is at the same time a file elsewhere, so that it can change without this folder being "
    "touched.",
    "FILE_TOO_LARGE": "A file is larger than any honest one. Limits keep a stranger from filling memory or disk.",
    "FOLDER_EMPTY": "An empty folder. A signature covers files, so nothing would notice what is put in there.",
    "FOLDER_TOO_LARGE": "More files than any honest folder has.",
    "JSON_INVALID": "A document cannot be read, or two programs could read it differently, and then they would "
    "disagree about what was signed.",
    # --- keys and members ---
    "KEY_UNKNOWN": "The key that signed belongs to nobody in this federation. Either the signer was not enrolled or is "
    "no longer a member, or the federation file here is not the current one; or a stranger signed.",
    "KEY_EXPIRED": "The key signed outside the time for which it was enrolled. Its owner needs a new key, or this "
    "machine's clock is wrong.",
    "KEY_REVOKED": "The key was withdrawn. `rotated` means that its owner has a newer key: what was received before "
    "that day stays good. `compromised` means that somebody else may hold the key: nothing that was received since "
    "that day counts, and what is older deserves a question to its owner.",
    "KEY_UNUSABLE": "This is no key of a kind that is accepted (ECDSA on P-256 or P-384), or not in its one form.",
    "SITE_UNKNOWN": "The federation has no site of this name.",
    "SITE_SUSPENDED": "The federation has suspended this site. What it signs does not count until it is reinstated.",
    "SITE_MISMATCH": "One site's key signed what claims to come from another site. Either the two exchanged keys or "
    "folders by mistake, or one speaks in the other's name. A key proves who its holder is, and nothing else does.",
    "COORDINATOR_MISMATCH": "One coordinator's key signed what claims to come from another coordinator.",
    "DOMAIN_MISMATCH": "The site speaks about a domain that it is not enrolled for.",
    "NOT_PERMITTED": "The federation file does not allow this site to contribute this.",
    # --- the federation file ---
    "TRUST_ROOT_UNKNOWN": "Anybody can make a federation file and sign it. This machine has no reason to believe these "
    "roots: compare their fingerprints with the roots themselves, on the phone or in person, not with what came along "
    "with the file.",
    "FEDERATION_INVALID": "This is no federation file that this version can read, or it contradicts itself.",
    "FEDERATION_THRESHOLD": "Fewer roots signed than the federation asks for. It is a draft, or somebody hopes that "
    "one root's signature will do.",
    "FEDERATION_MISMATCH": "This belongs to another federation. What is signed for one counts for no other, even if "
    "the same sites and keys are in both.",
    "FEDERATION_OLD": "This was signed under a newer federation file than the one at hand. Get the current file.",
    "FEDERATION_ROLLBACK": "Somebody offers an older federation file than one that this machine has seen, perhaps to "
    "bring a withdrawn key or a removed site back.",
    "FEDERATION_FORK": "There are two different federation files where there can be one: enough roots signed both, or "
    "versions were exchanged. Trust neither until the roots have explained it.",
    "FEDERATION_EXPIRED": "The federation file is too old to rely on. Who holds the current one back could hide that a "
    "key was withdrawn, so a file counts for a limited time only. Ask for the current one.",
    "FEDERATION_KEY_MOVED": "A key of one member appears under another member's name. Keys never change hands.",
    "FEDERATION_GAP": "Versions of the federation file are missing between the one known here and this one.",
    "REVOCATIONS_ROLLBACK": "Somebody offers an older revocation list than one that this machine has accepted, or one "
    "that takes a withdrawal back. Withdrawals stay.",
    "REVOCATIONS_FORK": "There are two different revocation lists with one number. Ask a root for a list with all of "
    "both.",
    "REVOCATIONS_INVALID": "This is no revocation list that this version can read.",
    "RECEIPT_INVALID": "The server's signature is genuine, but what it signed is no receipt that adds up; or the file "
    "holds no receipt, or several.",
    "RECEIPT_OTHER_ANSWER": "The receipt is genuine and belongs to other words. Somebody changed the answer, or put a "
    "receipt beside an answer that it was not made for.",
    "RECEIPT_OTHER_RELEASE": "The answer was written with another release than the one at hand.",
    "EXPERT_DEAD": "A site's expert was loaded and changes nothing that the model says, or breaks it. Its share of the "
    "answers would be an invention, so nothing is answered.",
    "EXPERT_UNMASKABLE": "Sites were withdrawn whose experts this release cannot do without. A new release is needed.",
    "RELEASE_WITHDRAWN": "A root of the federation has withdrawn this very release and asks that nobody use it. Its "
    "signatures are genuine; something else is wrong with it.",
    # --- time ---
    "CLOCK_BEHIND": "This machine's clock says an earlier time than it must be. With a clock that was set back, what "
    "has long expired would count again.",
    "CLOCK_SET_BACK": "This coordinator has seen a later time before, and decides nothing while its clock is behind: "
    "what has expired would count again, and the ledger would tell a false order.",
    "CONTRIBUTION_EXPIRED": "The contribution was received after the day that its site set for it. It may be an old "
    "one that somebody sends again.",
    "CONTRIBUTION_FROM_FUTURE": "The contribution is dated later than it was received. One of the two clocks is "
    "wrong, or this machine's was set back.",
    "RELEASE_FROM_FUTURE": "The release is dated later than now. Its coordinator's clock or this machine's is wrong, "
    "or was set back.",
    "REPLAYED": "The site has sent something newer before. An old contribution, however genuine, does not come back: "
    "whoever kept a copy could otherwise undo a site's correction.",
    "CALL_UNKNOWN": "The contribution answers a call that this coordinator never made: it was meant for another round, "
    "another coordinator or another federation.",
    "CALL_EXPIRED": "The time to answer this call has passed.",
    "CALL_FEDERATION": "The call is for another federation.",
    "CALL_BASE": "The call asks for a base model that the federation does not build on.",
    "CALL_SITE": "The call is not addressed to this site, or not in this domain.",
    "INVITATION_INVALID": "This is no invitation that this version can read.",
    "INVITATION_FEDERATION": "The invitation is to another federation. What is signed for one counts for no other.",
    "INVITATION_COORDINATOR": "A coordinator signed an invitation in another coordinator's name.",
    "INVITATION_OLD": "An invitation from before the one that is in use; its certificate may have been replaced.",
    "CALL_INVALID": "This is no call that this version can read.",
    "CALL_ID_TAKEN": "Two different calls bear one name. A coordinator makes each name once.",
    "CALL_COORDINATOR": "A coordinator signed a call in another coordinator's name.",
    "CALL_POLICY": "The call was made under another data-use policy than the one in the federation file here. One of "
    "the two federation files is not the current one.",
    "CALL_KIND": "The call does not ask for what came: an adapter, or traces.",
    "CALL_SHAPE": "The call asks for LoRAs of at most some rank on some modules, and this one is another.",
    "CALL_ANSWERED": "The site has answered this call before, with something else. A call is answered once; for a "
    "correction the coordinator makes a new call.",
    # --- the ledger ---
    "LEDGER_BROKEN": "An entry of the decision ledger was changed, removed, inserted or moved after it was written.",
    "LEDGER_TRUNCATED": "Entries at the end of the decision ledger are gone that somebody else has seen.",
    "LEDGER_FORKED": "The decision ledger was written anew from some entry on: somebody else has seen another one.",
    "LEDGER_SHRUNK": "The coordinator shows a decision ledger with fewer entries than it showed before. A ledger only "
    "grows: entries were removed, or the coordinator went back to an old copy.",
    "DELIVERY_INVALID": "The coordinator's receipt is for something else than what this site sent, or is no receipt.",
    "EGRESS_TYPE": "Something was to leave the site that is not on the closed list of what may. It did not.",
    "EGRESS_UNRECORDED": "A coordinator signed to have more bytes than this site's egress ledger tells of. Either the "
    "ledger is not the one that was there, or something else on this machine sends in the site's name.",
    # --- approvals and limits ---
    "APPROVER_KEY": "Somebody tried to approve in the name of an approver whose key is another one.",
    "SITE_QUOTA": "The site has sent more than one site may have in the store.",
    # --- messages ---
    "NOT_READY": "The site has no whole signed contribution yet. Ask again later.",
    "SITE_ERROR": "The site could not do what was asked, for a reason that it keeps to itself. Its operator finds it "
    "in the site's own log.",
    # --- what was signed ---
    "BASE_MISMATCH": "An expert fits only the base model that it was trained on, byte for byte. This one was made for "
    "another.",
    "PROVENANCE_INVALID": "The statement of where this comes from is not in the one form that is accepted.",
    "PROVENANCE_KIND": "The statement of where this comes from is about another kind of folder.",
    "PROVENANCE_SUBJECTS": "The statement of where this comes from was written for other files. Claims of one round "
    "were put beside weights of another.",
    "PROVENANCE_CONTENT": "The statement of where this comes from describes something else than what lies here.",
    "CONTRIBUTION_UNKNOWN": "This folder holds neither an adapter nor traces.",
    "COMPOSITION_INVALID": "The description of how the release is put together is not in the form that is accepted.",
    "COMPOSITION_EXPERTS": "The release does not name each expert that it holds exactly once.",
    "COMPOSITION_MISMATCH": "The parts of the release contradict one another about base, method or attention LoRA.",
    "INGREDIENT_MISMATCH": "The release holds another contribution of a site than its coordinator says. Each is what "
    "the site signed; they are not the same.",
    "INGREDIENT_TIME": "The release claims to hold an expert that was received only after it was made.",
    "INGREDIENT_CALL": "Two sites answered calls of one name that said different things. A coordinator makes each name "
    "once, so this one told its sites different things, or does not keep its calls apart.",
    "EVALUATION_INVALID": "The evaluation in the release is no document of that kind.",
    "ROUTER_INVALID": "The router does not have one row of finite numbers for each expert.",
    "SAFETENSORS_INVALID": "The file of weights is damaged, or built so that two programs could read it differently.",
    "ADAPTER_INVALID": "The adapter's configuration is not in the form that is accepted.",
    "ADAPTER_UNSUPPORTED": "The adapter asks for something that only a plain LoRA without extras may not ask for. Many "
    "such switches load code, fetch models or change the base.",
    "ADAPTER_TENSORS": "The adapter holds other tensors than its configuration implies. A further tensor could "
    "overwrite weights of the base.",
    "ADAPTER_NOT_FINITE": "The weights hold numbers that are none. They would spread through the whole model.",
    "ADAPTER_TOO_STRONG": "The adapter changes the model far more than training does. It would drown the others.",
    "GATES_INVALID": "The gates beside the expert are not one vector for each of its linears, so they would send "
    "tokens elsewhere than the site meant.",
    "GATES_NOT_PRIVATE": "The expert claims differential privacy, and the gates beside it were learned from the same "
    "data without it. Together they would not keep the promise.",
    "USE_RECIPIENT": "A site says in what it signed which coordinators may use it, and this is another. Ask the site.",
    "USE_EXPIRED": "A site says in what it signed until when it may be used, and that time is over. Ask the site to "
    "contribute again, or make the composition without it: fedcompose coordinator remove.",
    "AUDIT_BELOW_LIMIT": "The site itself asked that only audited adapters with a better verdict leave it, and this "
    "one left all the same. Its software was changed, or two versions of it were mixed up. Ask the site.",
    "EPSILON_ABOVE_LIMIT": "The site itself asked for more differential privacy than this adapter claims to have. Its "
    "software was changed, or two versions of it were mixed up. Ask the site.",
    "TRACES_UNVERIFIED": "A trace does not answer the problem that it names, made again here. Either the versions at "
    "both places differ, or the traces are not what they seem.",
    "TRACES_INVALID": "The traces are not in the form that is accepted.",
    "TRACES_CONTROL_TOKENS": "A trace holds markers that separate the roles of a chat, or characters that nobody sees. "
    "Either could smuggle an instruction into training.",
    "TRACES_CLASS": "The traces come from questions that must not leave the site, or claim an origin that they cannot "
    "have.",
}
