//! Prompts: texts, token ids and slots.

use std::sync::Arc;

use collm_engine::data::{Dataset, Samples, Split};
use collm_engine::llm::convert::convert_gguf;
use collm_engine::prompt::{
    LlmTokenizer, PromptBuilder, PromptStyle, Slot, SlotKind, Template, encode_rows, tokenize_split,
};

use proptest::prelude::*;

use crate::common::{shared, tokenizer_json};

fn tokenizer(dir: &std::path::Path) -> LlmTokenizer {
    std::fs::write(dir.join("tokenizer.json"), tokenizer_json()).unwrap();
    LlmTokenizer::from_dir(dir).unwrap()
}

/// Ids of the byte-level tokenizer as text: the inverse of it, slots as `@`.
fn text_of(ids: &[u32], slots: &[Slot]) -> String {
    let mut bytes = Vec::new();
    for (i, &id) in ids.iter().enumerate() {
        match id {
            _ if slots.iter().any(|s| s.position as usize == i) => bytes.push(b'@'),
            0..=255 => bytes.push(id as u8),
            256..=258 => bytes.extend(["Ye", "Yes", "No"][id as usize - 256].bytes()),
            other => panic!("id {other}"),
        }
    }
    String::from_utf8(bytes).unwrap()
}

#[test]
fn official_text_and_quirks() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let style = PromptStyle::default();
    let template = Template::find("collm_movie").unwrap();
    let builder = PromptBuilder::new(&tokenizer, &template, &style);
    let titles: Vec<String> = (0..12).map(|i| format!("Film {i}")).collect();
    let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
    let text = builder.text(&titles, " Heat (1995) ");
    assert_eq!(
        text,
        "<s>#Question: A user has given high ratings to the following movies: \"Film 2\", \"Film 3\", \"Film 4\", \"Film 5\", \
         \"Film 6\", \"Film 7\", \"Film 8\", \"Film 9\", \"Film 10\", \"Film 11\". Additionally, we have information about the \
         user's preferences encoded in the feature <unk>. Using all available information, make a prediction about whether the \
         user would enjoy the movie titled \"Heat (1995)\" with the feature <unk>? Answer with \"Yes\" or \"No\". \\n#Answer:"
    );
    let (ids, slots) = builder.encode(&titles, "Heat (1995)").unwrap();
    assert_eq!(text_of(&ids, &slots), text.replace("<unk>", "@"));
    assert_eq!(slots.iter().map(|s| s.kind).collect::<Vec<_>>(), [SlotKind::User, SlotKind::Item]);
    assert!(slots.iter().all(|s| ids[s.position as usize] == tokenizer.placeholder_id()));
    // PARITY: an empty history is the word "unkow"; a line break stays two characters unless told otherwise.
    assert!(builder.text(&[], "X").contains("following movies: unkow. "));
    let plain = PromptStyle { literal_newline: false, empty_history: "none".into(), begin: String::new(), ..style };
    let text = PromptBuilder::new(&tokenizer, &template, &plain).text(&[], "X");
    assert!(text.starts_with("#Question") && text.contains("movies: none.") && text.ends_with("\". \n#Answer:"));
}

#[test]
fn a_title_with_special_text_is_only_text() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let (style, template) = (PromptStyle::default(), Template::find("collm_movie").unwrap());
    let builder = PromptBuilder::new(&tokenizer, &template, &style);
    let nasty = "<unk> <UserID> \"quoted\" <TargetItemID>\u{0}é";
    let (ids, slots) = builder.encode(&[nasty], nasty).unwrap();
    assert_eq!(slots.len(), 2);
    assert_eq!(text_of(&ids, &slots).matches(nasty).count(), 2);
    assert_eq!(ids.iter().filter(|&&id| id == tokenizer.placeholder_id()).count(), 2);
}

#[test]
fn several_tokens_a_vector_are_joined_by_dots() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let style = PromptStyle { tokens_per_vector: 3, ..PromptStyle::default() };
    let template = Template::find("collm_movie").unwrap();
    let (ids, slots) = PromptBuilder::new(&tokenizer, &template, &style).encode(&[], "X").unwrap();
    assert!(text_of(&ids, &slots).contains("in the feature @.@.@. Using"));
    assert_eq!(slots.iter().map(|s| s.part).collect::<Vec<_>>(), [0, 1, 2, 0, 1, 2]);
}

#[test]
fn long_prompts_lose_old_titles_and_never_a_slot() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let template = Template::find("collm_movie").unwrap();
    let long = "A title of forty characters, or nearly so";
    let titles = vec![long; 10];
    let free = PromptStyle::default();
    let all = PromptBuilder::new(&tokenizer, &template, &free).encode(&titles, "X").unwrap().0.len();
    let style = PromptStyle { max_tokens: all - 1, ..PromptStyle::default() };
    let (ids, slots) = PromptBuilder::new(&tokenizer, &template, &style).encode(&titles, "X").unwrap();
    assert_eq!(text_of(&ids, &slots).matches(long).count(), 9);
    assert_eq!(slots.len(), 2);
    let style = PromptStyle { max_tokens: 50, ..PromptStyle::default() };
    let e = PromptBuilder::new(&tokenizer, &template, &style).encode(&titles, "X").unwrap_err().to_string();
    assert!(e.contains("exceeds prompt.style.max_tokens = 50 even with an empty history"), "{e}");
}

fn dataset() -> Dataset {
    let mut samples = Samples::empty();
    for i in 0..300 {
        samples.push(i, 1, 1 + (i % 5) as u32, 1, 0, &[1, 2, 3][..(i % 4) as usize]);
    }
    samples.not_cold = vec![true; 300];
    (samples.warm, samples.both_new) = (samples.not_cold.clone(), samples.not_cold.clone());
    let titles = (0..6).map(|i| format!("Film {i}")).collect();
    Dataset {
        train: samples.clone(),
        valid: samples.clone(),
        valid_small: samples.clone(),
        test: samples,
        titles: Arc::new(titles),
        n_users: 2,
        n_items: 6,
        fingerprint: "f".into(),
    }
}

#[test]
fn the_cache_is_used_and_a_damaged_one_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let (style, template, data) = (PromptStyle::default(), Template::find("collm_movie").unwrap(), dataset());
    let builder = PromptBuilder::new(&tokenizer, &template, &style);
    let cache = dir.path().join("cache");
    let calls = std::sync::atomic::AtomicUsize::new(0);
    let count = |_: usize| _ = calls.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let made = || calls.swap(0, std::sync::atomic::Ordering::Relaxed);
    let tokenize = |builder: &PromptBuilder| tokenize_split(&data, Split::Test, builder, &cache, &count).unwrap();
    let memory = encode_rows(&data.titles, &data.test, &builder).unwrap();
    let same = |set: &collm_engine::prompt::PromptSet| {
        assert_eq!(set.len(), 300);
        for i in 0..300 {
            assert_eq!((set.get(i).ids, set.get(i).slots), (memory.get(i).ids, memory.get(i).slots), "row {i}");
        }
    };
    same(&tokenize(&builder));
    assert_eq!(made(), 300);
    same(&tokenize(&builder));
    assert_eq!(made(), 0, "the second time it is read");
    let file = std::fs::read_dir(&cache).unwrap().next().unwrap().unwrap().path();
    let whole = std::fs::read(&file).unwrap();
    for damage in [whole.len() - 1, whole.len() / 2, 100, 50, 7, 0] {
        let mut bytes = whole.clone();
        if damage % 2 == 0 {
            bytes[damage] ^= 1;
        } else {
            bytes.truncate(damage);
        }
        std::fs::write(&file, bytes).unwrap();
        same(&tokenize(&builder));
        assert_eq!(made(), 300, "damage at {damage}");
    }
    std::fs::write(&file, "").unwrap();
    same(&tokenize(&builder));
    assert_eq!(made(), 300, "an empty file");
    let other = PromptStyle { max_history: 1, ..PromptStyle::default() };
    tokenize(&PromptBuilder::new(&tokenizer, &template, &other));
    assert_eq!(made(), 300, "another style is another file");
}

/// Ids of the official dataset class, on real rows with the real tokenizer: needs the shared data and SmolLM2's GGUF.
#[test]
fn golden_token_ids() {
    let (Some(golden), Some(data)) = (shared("golden/prompts-ml1m/prompts.jsonl"), shared("data/ml-1m")) else {
        return;
    };
    let Some(gguf) = std::env::var_os("SMOLLM2_GGUF") else {
        println!("skipped: SMOLLM2_GGUF does not name SmolLM2-135M-Instruct.Q4_1.gguf");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    convert_gguf(gguf.as_ref(), &model, false).unwrap();
    let tokenizer = LlmTokenizer::from_dir(&model).unwrap();
    assert_eq!(tokenizer.answer_ids().unwrap(), (10_539, 5_230));
    let data = Dataset::load(&data).unwrap();
    let style = PromptStyle::default();
    let templates = ["tallrec_movie", "collm_movie"].map(|n| Template::find(n).unwrap());
    let mut n = 0;
    for line in std::fs::read_to_string(golden).unwrap().lines() {
        let row: serde_json::Value = serde_json::from_str(line).unwrap();
        let split = Split::ALL.into_iter().find(|s| s.name() == row["split"]).unwrap();
        let (samples, i) = (data.split(split), row["row"].as_u64().unwrap() as usize);
        let builder = PromptBuilder::new(&tokenizer, &templates[usize::from(row["kind"] == "collm")], &style);
        let history: Vec<&str> = samples.history(i).iter().map(|&h| data.titles[h as usize].as_str()).collect();
        let target = &data.titles[samples.iid[i] as usize];
        assert_eq!(builder.text(&history, target), row["prompt"].as_str().unwrap());
        let want: Vec<u32> = row["ids"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect();
        assert_eq!(builder.encode(&history, target).unwrap().0, want, "{line}");
        n += 1;
    }
    assert_eq!(n, 88);
}

#[test]
fn special_tokens_of_a_template_are_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let template = Template::parse("mine", "A<unk><TargetItemTitle>, <UserID>?").unwrap();
    let style = PromptStyle { begin: "<unk>".into(), ..PromptStyle::default() };
    let builder = PromptBuilder::new(&tokenizer, &template, &style);
    assert_eq!(builder.text(&[], "<unk>"), "<unk>A<unk>\"<unk>\", <unk>?");
    let (ids, slots) = builder.encode(&[], "<unk>").unwrap();
    let text = |s: &str| s.bytes().map(u32::from).collect::<Vec<u32>>();
    assert_eq!(ids, [vec![259], text("A"), vec![259], text("\"<unk>\", "), vec![259], text("?")].concat());
    assert_eq!(
        slots,
        [Slot { position: 12, kind: SlotKind::User, part: 0 }],
        "the one slot is where the template says"
    );
}

proptest! {
    /// Whatever the titles say: without slots a prompt's ids are those of its whole text, with slots there are two.
    #[test]
    fn any_titles(titles in prop::collection::vec(".{0,20}", 0..12), target in ".{0,20}") {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = tokenizer(dir.path());
        let style = PromptStyle::default();
        let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
        let template = Template::find("tallrec_movie").unwrap();
        let builder = PromptBuilder::new(&tokenizer, &template, &style);
        let text = builder.text(&titles, &target);
        prop_assert_eq!(builder.encode(&titles, &target).unwrap().0, tokenizer.encode(&text).unwrap());
        let template = Template::find("collm_movie").unwrap();
        let (ids, slots) = PromptBuilder::new(&tokenizer, &template, &style).encode(&titles, &target).unwrap();
        prop_assert_eq!(slots.iter().map(|s| s.kind).collect::<Vec<_>>(), [SlotKind::User, SlotKind::Item]);
        prop_assert!(slots.iter().all(|s| ids[s.position as usize] == tokenizer.placeholder_id()));
    }
}

/// Examples are prompts with their answers, a line each; only the first begins as a prompt does.
#[test]
fn examples_come_before_the_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = tokenizer(dir.path());
    let template = Template::parse("short", "<ItemTitleList> then <TargetItemTitle>?").unwrap();
    let style = PromptStyle::default();
    let builder = PromptBuilder::new(&tokenizer, &template, &style);
    let examples = builder.encode_examples(&[(vec!["A", "B"], "C", true), (vec![], "D", false)]).unwrap();
    let (yes, no) = tokenizer.answer_ids().unwrap();
    let text = |t: &str| tokenizer.encode(t).unwrap();
    let want =
        [text("<s>\"A\", \"B\" then \"C\"?"), vec![yes], text("\nunkow then \"D\"?"), vec![no], text("\n")].concat();
    assert_eq!(examples, want);
    let prompt = builder.after(&examples).encode(&["E"], "F").unwrap();
    assert_eq!(prompt.0, [want, text("\"E\" then \"F\"?")].concat());
    let short = PromptStyle { max_tokens: 30, ..PromptStyle::default() };
    let e = PromptBuilder::new(&tokenizer, &template, &short).after(&examples).encode(&["E"], "F").unwrap_err();
    assert!(e.to_string().contains("30"), "examples count: {e}");
    let none = PromptBuilder::new(&tokenizer, &template, &style).after(&[]).encode(&["E"], "F").unwrap();
    assert_eq!(none.0, text("<s>\"E\" then \"F\"?"));
}
